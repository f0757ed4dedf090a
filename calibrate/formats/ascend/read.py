"""Reads the layers of an ascend checkpoint, to be put into a float model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.capture.arrays import LARGE, Array

from ...layers.inputs import INPUTS
from ...layers.modules import Geometry, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ...layers.numbers import Numbers
from ...layers.scheme import ACTIVATION
from ...layers.transforms import Multiply
from .checkpoint import Checkpoint
from .difference import difference
from .numbers import Floats, read_numbers


class Opened:
    """An ascend checkpoint whose integer layers can be put into the float model it was made from."""

    def __init__(self, directory: Path) -> None:
        self._checkpoint = Checkpoint(directory)

    @property
    def layer_names(self) -> list[str]:
        """The names of the quantized layers."""
        return self._checkpoint.layer_names

    def layer(self, name: str) -> QuantizedLayer:
        """Reads one quantized layer."""
        return read_layer(self._checkpoint, name)

    def difference(self, model: nn.Module) -> str | None:
        """The first sign that the checkpoint was not made from the float `model`; None where there is none."""
        return difference(self._checkpoint, model)


def read_layer(checkpoint: Checkpoint, name: str) -> QuantizedLayer:
    """Reads the layer `name`. Raises FileError for numbers that no export writes."""
    found = read_numbers(checkpoint, name)
    integers, scale, zero_point = found.integers, found.integers.input_scale, found.integers.zero_point
    tensors = {"input_scale": _given(scale), "input_zero_point": _given(zero_point), "edges": _given(found.edges)}
    multiplier = _floats(found.multiplier)
    numbers = Numbers(
        _tensor(integers.weight), _tensor(integers.weight_scale), _floats(found.bias),
        INPUTS[integers.scheme].of(tensors, ACTIVATION), getattr(torch, found.dtype),
        None if multiplier is None else Multiply(multiplier), _given(integers.deq), _given(integers.quant_bias),
        checkpoint.made_bias(name),
    )  # fmt: skip
    convolution = found.convolution
    return QuantizedLinear(numbers) if convolution is None else QuantizedConv2d(numbers, Geometry(*convolution))


def _tensor(array: Array) -> Tensor:
    """The tensor of an array. A small one is copied into memory of torch, a large one has pages of its own already."""
    return torch.from_numpy(array) if array.nbytes >= LARGE else torch.tensor(array)


def _given(array: Array | None) -> Tensor | None:
    return None if array is None else _tensor(array)


def _floats(floats: Floats | None) -> Tensor | None:
    return None if floats is None else _tensor(floats.values).to(getattr(torch, floats.dtype))


def load_ascend(directory: Path | str) -> dict[str, QuantizedLayer]:
    """Reads the quantized layers of a checkpoint by name, with the very integers that were exported.

    Raises FileError for files that are missing, damaged, or hold numbers that no export writes.
    """
    checkpoint = Checkpoint(directory)
    return {name: read_layer(checkpoint, name) for name in checkpoint.layer_names}
