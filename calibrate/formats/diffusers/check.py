"""Checks whether diffusers with Octavo can load a directory, line by line, and why not.

Names, dtypes and shapes are read from the headers of the files; the integers are computed as in an ascend checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from octavo.capture.errors import OctavoError

from ...layers.inputs import INPUTS
from ...layers.modules import QuantizedLinear
from ...layers.numbers import Numbers
from ...layers.scheme import ACTIVATION
from ..arithmetic import correction_share, shares
from ..verdict import OCTAVO, Verdict
from .directory import Model, StoredTensor
from .structure import Kind, Structure
from .write import CONFIG_FILE


def check(directory: Path) -> list[Verdict]:
    """The verdicts on a directory with Octavo's quant_method."""
    try:
        return list(_octavo(Model.open(directory)))
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error))]


def _octavo(model: Model) -> Iterator[Verdict]:
    try:
        structure = Structure.read(model.quantization)
    except OctavoError as error:
        yield Verdict(OCTAVO, CONFIG_FILE, False, str(error))
        return
    fact = f"{model.config.get('_class_name')}, {len(structure.kinds)} integer layers, tensors complete"
    misfit = _misfit(model, structure)
    yield Verdict(OCTAVO, "tensors", misfit is None, misfit or fact)
    if misfit is None:
        yield _numbers(model, structure)


def _misfit(model: Model, structure: Structure) -> str | None:
    """The first tensor of an integer layer that is missing, superfluous, or has another dtype or shape."""
    for name, kind in structure.kinds.items():
        weight = model.tensors.get(f"{name}.weight")
        if weight is None:
            return f"{name}.weight is missing"
        wanted = _wanted(kind, weight.stored.shape)
        there = {key.rpartition(".")[2]: place for key, place in _of(model, name).items()}
        for leaf in sorted(set(wanted) - set(there)):
            return f"{name}.{leaf} is missing"
        for leaf in sorted(set(there) - set(wanted) - {"bias"}):
            return f"{name}.{leaf} has no place in a {kind.scheme} layer"
        for leaf, (dtype, shape) in wanted.items():
            stored = there[leaf].stored
            if stored.shape != shape or (dtype is not None and stored.dtype != dtype):
                return f"{name}.{leaf} is {str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
    return None


def _of(model: Model, name: str) -> dict[str, StoredTensor]:
    return {key: place for key, place in model.tensors.items() if key.rpartition(".")[0] == name}


def _wanted(kind: Kind, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtypes (None: the model's) and shapes of the tensors that a layer has; a bias may come on top."""
    outputs, leading = shape[0], (kind.bins,) if kind.bins else ()
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "weight": (torch.int8, shape),
        "weight_scale": (torch.float32, (outputs,)),
    }
    if kind.multiplied:
        wanted["mul_scale"] = (None, shape[1:2])
    if kind.made_bias:
        wanted["bias"] = (None, (outputs,))
    if INPUTS[kind.scheme].ranged:
        wanted["input_scale"] = (torch.float32, leading)
        wanted["input_zero_point"] = (torch.int32, leading)
        wanted["deq"] = (torch.float32, (*leading, outputs))
        wanted["quant_bias"] = (torch.int32, (*leading, outputs))
    if kind.bins:
        wanted["edges"] = (torch.float32, (kind.bins - 1,))
    return wanted


def _numbers(model: Model, structure: Structure) -> Verdict:
    """The verdict on whether the integers compute the layers, up to what rounding and corrections explain."""
    share, where = 0.0, ""
    for name, kind in structure.kinds.items():
        layer = _layer(model, name, kind, structure.dtype)
        scales, bias = shares(layer)
        found = max(scales, min(bias, correction_share(layer)) if bias > 1.0 else bias)
        if found > share or not where:
            share, where = found, name
    fact = f"off by at most {share:.2f} of what rounding and corrections explain"
    return Verdict("octavo", "integers", share <= 1.0, fact if share <= 1.0 else f"{fact} ({where})")


def _layer(model: Model, name: str, kind: Kind, dtype: torch.dtype) -> QuantizedLinear:
    """Reads an integer layer; a convolution as the linear layer of its patches."""
    read = {key.rpartition(".")[2]: place.read() for key, place in _of(model, name).items()}
    input = INPUTS[kind.scheme].of(read, ACTIVATION)
    weight, bias = read["weight"].flatten(1), read.get("bias")
    output = read.get("deq"), read.get("quant_bias")
    return QuantizedLinear(Numbers(weight, read["weight_scale"], bias, input, dtype, None, *output, kind.made_bias))
