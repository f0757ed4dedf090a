"""Checks whether diffusers with Octavo can load a directory, line by line, and why not.

Names, dtypes and shapes are read from the headers of the files; the integers are computed as in an ascend checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

from octavo.capture.errors import OctavoError

from ...layers.schemes import RANGED
from ..arithmetic import correction_share, shares
from ..integers import Integers
from ..verdict import OCTAVO, Verdict
from .directory import CONFIG_FILE, Model, StoredTensor
from .structure import Kind, Structure

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_READ = ("weight", "weight_scale", "bias", "input_scale", "input_zero_point", "deq", "quant_bias")  # to compute with


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
        if len(weight.stored.shape) not in (2, 4):
            return f"{name}.weight has shape {list(weight.stored.shape)}"
        wanted = _wanted(kind, weight.stored.shape)
        there = {key.rpartition(".")[2]: place for key, place in _of(model, name).items()}
        for leaf in sorted(set(wanted) - set(there)):
            return f"{name}.{leaf} is missing"
        if "bias" in there:
            wanted["bias"] = (None, weight.stored.shape[:1])
        for leaf in sorted(set(there) - set(wanted)):
            return f"{name}.{leaf} has no place in a {kind.scheme} layer"
        for leaf, (dtype, shape) in wanted.items():
            stored = there[leaf].stored
            if stored.shape != shape or stored.dtype not in (_FLOATS if dtype is None else (dtype,)):
                return f"{name}.{leaf} is {stored.dtype} {list(stored.shape)}"
    return None


def _of(model: Model, name: str) -> dict[str, StoredTensor]:
    return {key: place for key, place in model.tensors.items() if key.rpartition(".")[0] == name}


def _wanted(kind: Kind, shape: tuple[int, ...]) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Dtypes (None: a float one) and shapes of the tensors that a layer has; a bias may come on top."""
    outputs, leading = shape[0], (kind.bins,) if kind.bins else ()
    wanted: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "weight": ("int8", shape),
        "weight_scale": ("float32", (outputs,)),
    }
    if kind.multiplied:
        wanted["mul_scale"] = (None, shape[1:2])
    if kind.made_bias:
        wanted["bias"] = (None, (outputs,))
    if kind.scheme in RANGED:
        wanted["input_scale"] = ("float32", leading)
        wanted["input_zero_point"] = ("int32", leading)
        wanted["deq"] = ("float32", (*leading, outputs))
        wanted["quant_bias"] = ("int32", (*leading, outputs))
    if kind.bins:
        wanted["edges"] = ("float32", (kind.bins - 1,))
    return wanted


def _numbers(model: Model, structure: Structure) -> Verdict:
    """The verdict on whether the integers compute the layers, up to what rounding and corrections explain."""
    share, where = 0.0, ""
    for name, kind in structure.kinds.items():
        layer = _layer(model, name, kind)
        scales, bias = shares(layer)
        found = max(scales, min(bias, correction_share(layer)) if bias > 1.0 else bias)
        if found > share or not where:
            share, where = found, name
    fact = f"off by at most {share:.2f} of what rounding and corrections explain"
    return Verdict("octavo", "integers", share <= 1.0, fact if share <= 1.0 else f"{fact} ({where})")


def _layer(model: Model, name: str, kind: Kind) -> Integers:
    """Reads the numbers of an integer layer."""
    read = {leaf: model.tensors[f"{name}.{leaf}"].read() for leaf in _READ if f"{name}.{leaf}" in model.tensors}
    ranges = [read.get(leaf) for leaf in ("input_scale", "input_zero_point", "deq", "quant_bias")]
    return Integers(kind.scheme, read["weight"], read["weight_scale"], read.get("bias"), *ranges)
