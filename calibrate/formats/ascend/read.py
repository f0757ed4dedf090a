"""Reads the integer layers of an ascend checkpoint as torch modules, to be put into a float model."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.capture.arrays import LARGE, Array

from ...layers.inputs import INPUTS, RULES
from ...layers.modules import Geometry, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ...layers.numbers import Numbers
from ...layers.transforms import Multiply
from .checkpoint import Checkpoint
from .difference import difference
from .numbers import Floats, read_numbers


class AscendLayers:
    """The integer layers of the ascend checkpoint in `directory`, which can be read one by one, and compared with the
    float model that they are to be put into. Raises FileError for files that are missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self._checkpoint = Checkpoint(directory)

    @property
    def layer_names(self) -> list[str]:
        """The names of the integer layers."""
        return self._checkpoint.layer_names

    def layer(self, name: str) -> QuantizedLayer:
        """Reads the integer layer `name`. Raises FileError for numbers that no export writes, such as a negative
        scale."""
        return read_layer(self._checkpoint, name)

    def difference(self, model: nn.Module) -> str | None:
        """Returns a fact, in words, that shows that the checkpoint was not made from the float `model`, such as a layer
        that the model lacks; None if there is no such fact."""
        return difference(self._checkpoint, model)


def read_layer(checkpoint: Checkpoint, name: str) -> QuantizedLayer:
    """Reads the integer layer `name` from a checkpoint. Raises FileError for numbers that no export writes, such as a
    negative scale."""
    layer = read_numbers(checkpoint, name)
    integers, scale, zero_point = layer.integers, layer.integers.input_scale, layer.integers.zero_point
    tensors = {
        "input_scale": _optional(scale),
        "input_zero_point": _optional(zero_point),
        "edges": _optional(layer.edges),
    }
    multiplier = _floats(layer.multiplier)
    rule = RULES[integers.scheme]
    rule = replace(rule, clamping=rule.block is not None)  # scales of inputs are those of npu_dynamic_mx_quant
    weight, bias, dtype = _tensor(integers.weight), _floats(layer.bias), getattr(torch, layer.dtype)
    if rule.block is not None:
        weight, bias = weight.view(rule.element.dtype), _narrowed(bias, dtype)
    numbers = Numbers(
        weight, _tensor(integers.weight_scale), bias, INPUTS[integers.scheme].of(tensors, rule), dtype,
        None if multiplier is None else Multiply(multiplier), _optional(integers.deq), _optional(integers.quant_bias),
        checkpoint.made_bias(name),
    )  # fmt: skip
    convolution = layer.convolution
    return QuantizedLinear(numbers) if convolution is None else QuantizedConv2d(numbers, Geometry(*convolution))


def _tensor(array: Array) -> Tensor:
    """Returns `array` as a tensor. An array of 256 KiB (LARGE) or more shares its memory with the tensor; a smaller one
    is copied."""
    return torch.from_numpy(array) if array.nbytes >= LARGE else torch.tensor(array)


def _optional(array: Array | None) -> Tensor | None:
    return None if array is None else _tensor(array)


def _floats(floats: Floats | None) -> Tensor | None:
    return None if floats is None else _tensor(floats.values).to(getattr(torch, floats.dtype))


def _narrowed(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns `bias`, which was written in float32, in the `dtype` of the float layer; unchanged if the conversion
    would change a value."""
    if bias is None:
        return None
    narrow = bias.to(dtype)
    return narrow if torch.equal(narrow.to(bias.dtype), bias) else bias


def load_ascend(directory: Path | str) -> dict[str, QuantizedLayer]:
    """Returns a dict from layer name to integer layer, read from the checkpoint in `directory` exactly as exported.

    Raises FileError for files that are missing or damaged, and for numbers that no export writes.
    """
    checkpoint = Checkpoint(directory)
    return {name: read_layer(checkpoint, name) for name in checkpoint.layer_names}
