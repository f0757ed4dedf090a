"""Checks whether diffusers with Octavo can load a directory in format `diffusers`, and says what is wrong if not.

Names, dtypes and shapes are read from the headers of the files. Scales, deq and quant_bias are checked with the
functions that check them in an ascend checkpoint.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from octavo.capture.errors import OctavoError

from ...layers.schemes import BLOCK, FP8_RANGED, MXFP8, MXFP8_WEIGHT_ONLY, RANGED, ROTATIONS, SCHEMES
from ..arithmetic import correction_ratio, error_ratios
from ..e4m3 import is_nan
from ..integers import Integers
from ..verdict import OCTAVO, Verdict
from .directory import CONFIG_FILE, Model, StoredTensor
from .structure import LayerKind, Structure

_FLOATS = ("float64", "float32", "float16", "bfloat16")  # dtypes that the float tensors of a layer may have
# the tensors of an integer layer that its output is computed from
_READ = ("weight", "weight_scale", "bias", "input_scale", "input_zero_point", "deq", "quant_bias")


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether diffusers with Octavo can load `directory`, whose config.json has the
    quant_method "octavo". Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Model.open(directory)))
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error))]


def _verdicts(model: Model) -> Iterator[Verdict]:
    try:
        structure = Structure.read(model.quantization)
    except OctavoError as error:
        yield Verdict(OCTAVO, CONFIG_FILE, False, str(error))
        return
    fact = f"{model.config.get('_class_name')} with {len(structure.kinds)} quantized layers, all tensors are there"
    misfit = _misfit(model, structure)
    yield Verdict(OCTAVO, "tensors", misfit is None, misfit or fact)
    if misfit is None:
        yield _numbers(model, structure)


def _misfit(model: Model, structure: Structure) -> str | None:
    """Compares the tensors of the integer layers with `structure`, which was read from the checkpoint's config. Returns
    the first fault in words: a tensor that is missing, superfluous, or of a wrong dtype or shape. Returns None if all
    fit."""
    for name, kind in structure.kinds.items():
        weight = model.tensors.get(f"{name}.weight")
        if weight is None:
            return f"{name}.weight is missing"
        if len(weight.stored.shape) not in (2, 4):
            return f"{name}.weight has shape {list(weight.stored.shape)}, not two or four axes"
        multiplier = model.tensors.get(f"{name}.mul_scale")
        groups = 1 if multiplier is None else _groups(weight.stored.shape, multiplier.stored.shape)
        needed = _needed_tensors(kind, weight.stored.shape, groups)
        tensors = _tensors_of(model, name)
        for leaf in sorted(set(needed) - set(tensors)):
            return f"{name}.{leaf} is missing"
        if "bias" in tensors:
            needed["bias"] = (None, weight.stored.shape[:1])
        for leaf in sorted(set(tensors) - set(needed)):
            return f"{name}.{leaf} has no place in a {kind.scheme} layer"
        for leaf, (dtype, shape) in needed.items():
            stored = tensors[leaf].stored
            if stored.shape != shape or stored.dtype not in (_FLOATS if dtype is None else (dtype,)):
                return f"{name}.{leaf} is {stored.dtype} {list(stored.shape)}, not {dtype or 'float'} {list(shape)}"
    return None


def _tensors_of(model: Model, name: str) -> dict[str, StoredTensor]:
    parts = {key: key.rpartition(".") for key in model.tensors}
    return {leaf: model.tensors[key] for key, (owner, _, leaf) in parts.items() if owner == name}


def _groups(weight: tuple[int, ...], multiplier: tuple[int, ...]) -> int:
    """Returns the number of groups of a convolution, found from two shapes: that of its weight (out, in / groups,
    height, width), and that of the multiplier of its input, which has one number for each input channel. Returns 1 for
    a linear layer, and if no number of groups fits both shapes."""
    groups, rest = divmod(math.prod(multiplier), weight[1])
    return groups if len(weight) == 4 and groups and not rest and not weight[0] % groups else 1


def _needed_tensors(
    kind: LayerKind, shape: tuple[int, ...], groups: int
) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Returns the tensors that an integer layer of this `kind` must have: a dict from the last part of the tensor's
    name, such as "deq", to dtype and shape. `shape` is that of the layer's weight, `groups` the number of
    groups of a convolution. The dtype None stands for any float dtype. The bias of the float layer is optional and left
    out."""
    outputs, leading = shape[0], (kind.bins,) if kind.bins else ()
    needed: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "weight": ("int8" if kind.scheme in SCHEMES else "float8_e4m3fn", shape),
        "weight_scale": ("float32", (outputs,)),
    }
    if kind.scheme in (MXFP8, MXFP8_WEIGHT_ONLY):
        needed["weight_scale"] = ("uint8", (outputs, shape[1] // BLOCK))
    if kind.multiplied:
        needed["mul_scale"] = (None, (shape[1] * groups,))
    if kind.rotation:
        needed["rotation"] = ("int32", (ROTATIONS[kind.rotation],))
    if kind.made_bias:
        needed["bias"] = (None, (outputs,))
    if kind.scheme in (*RANGED, *FP8_RANGED):
        needed["input_scale"] = ("float32", leading)
        needed["input_zero_point"] = ("int32", leading)
    if kind.scheme in RANGED:
        needed["deq"] = ("float32", (*leading, outputs))
        needed["quant_bias"] = ("int32", (*leading, outputs))
    if kind.bins:
        needed["edges"] = ("float32", (kind.bins - 1,))
    return needed


def _numbers(model: Model, structure: Structure) -> Verdict:
    """Returns the verdict on the numbers of the layers that `structure` lists. The verdict is positive if two things
    hold. Layers with integer codes compute the same outputs as the dequantized layers, except for the errors that
    rounding and bias corrections can cause. Layers with FP8 codes have positive, finite scales, and no code that is
    NaN."""
    ratio, worst = 0.0, ""
    for name, kind in structure.kinds.items():
        if kind.scheme not in SCHEMES:
            if fault := _float_fault(model, name):
                return Verdict("octavo", "codes", False, fault)
            continue
        layer = _layer(model, name, kind)
        scales, bias = error_ratios(layer)
        largest = max(scales, min(bias, correction_ratio(layer)) if bias > 1.0 else bias)
        if largest > ratio or not worst:
            ratio, worst = largest, name
    if not worst:
        return Verdict("octavo", "codes", True, "all codes are numbers, and all scales are positive and finite")
    fact = f"the largest error is {ratio:.2f} of what rounding and bias corrections can cause"
    return Verdict("octavo", "integers", ratio <= 1.0, fact if ratio <= 1.0 else f"{fact} ({worst})")


def _float_fault(model: Model, name: str) -> str | None:
    """Returns what is wrong with the numbers of the layer `name`, whose codes are FP8 numbers; None if nothing is."""
    if bool(is_nan(model.tensors[f"{name}.weight"].bits()).any()):
        return f"{name}.weight has codes that are NaN"
    for leaf in ("weight_scale", "input_scale"):
        if (tensor := model.tensors.get(f"{name}.{leaf}")) is None or tensor.stored.dtype == "uint8":
            continue
        scales = tensor.read()
        if not bool(((scales > 0) & np.isfinite(scales)).all()):
            return f"{name}.{leaf} has scales that are not positive and finite"
    return None


def _layer(model: Model, name: str, kind: LayerKind) -> Integers:
    """Reads weight codes, scales, bias, deq and quant_bias of the integer layer `name`, a layer of the given `kind`.
    Leaves out the smoothing multiplier and the noise levels that separate timestep bins, which the check does not need.
    """
    tensors = {leaf: model.tensors[f"{name}.{leaf}"].read() for leaf in _READ if f"{name}.{leaf}" in model.tensors}
    ranges = [tensors.get(leaf) for leaf in ("input_scale", "input_zero_point", "deq", "quant_bias")]
    return Integers(kind.scheme, tensors["weight"], tensors["weight_scale"], tensors.get("bias"), *ranges)
