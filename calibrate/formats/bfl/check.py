"""Checks whether diffusers loads a directory in format `bfl`, and reports faults that change the output of the model
without an error. The rules are in the module `rules`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from octavo.capture.errors import OctavoError

from ..diffusers.directory import INDEX_FILE, Model
from ..e4m3 import is_nan
from ..verdict import Verdict

CONSUMER = "diffusers (bfl)"
WEIGHT, SCALE, CODES = ".weight", ".weight_scale", "float8_e4m3fn"
_AGAIN = "Run octavo calibrate --element fp8 --format bfl"


def fp8_layers(model: Model) -> list[str]:
    """Returns the names of the layers whose weight is stored as codes of e4m3."""
    weights = (name for name, tensor in model.tensors.items() if tensor.stored.dtype == CODES)
    return [name.removesuffix(WEIGHT) for name in weights if name.endswith(WEIGHT)]


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether diffusers loads `directory`, whose config.json has the quant_method "bfl". Files
    that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(directory, Model.open(directory)))
    except OctavoError as error:
        return [Verdict(CONSUMER, "files", False, str(error))]


def _verdicts(directory: Path, model: Model) -> Iterator[Verdict]:
    if (directory / INDEX_FILE).is_file():
        yield Verdict(CONSUMER, "files", False, f"from_single_file loads one file, but there are several. {_AGAIN}")
    names = fp8_layers(model)
    faults = [*_scales_without_codes(model), *(fault for name in names for fault in _faults(model, name))]
    fact = f"{len(names)} FP8 layers, each with a scale for each output" if names else "no layer is FP8"
    fact = f"{faults[0]}. {_AGAIN}" if faults else fact
    yield Verdict(CONSUMER, "layers", bool(names) and not faults, fact)


def _scales_without_codes(model: Model) -> Iterator[str]:
    """Yields in words each layer that has a scale, but no codes: diffusers refuses the file."""
    for name in model.tensors:
        if name.endswith(SCALE) and (weight := model.tensors.get(name.removesuffix(SCALE) + WEIGHT)) is None:
            yield f"{name} has no weight beside it"
        elif name.endswith(SCALE) and weight is not None and weight.stored.dtype != CODES:
            yield f"{name} stands beside a weight that is {weight.stored.dtype}, which diffusers refuses"


def _faults(model: Model, name: str) -> Iterator[str]:
    """Yields in words what is wrong with the FP8 layer `name`."""
    weight, scale = model.tensors[name + WEIGHT], model.tensors.get(name + SCALE)
    if scale is None:
        yield f"{name}{SCALE} is missing, so that diffusers silently takes the codes for weights"
    elif scale.stored.dtype != "float32" or scale.stored.shape != weight.stored.shape[:1]:
        yield f"{name}{SCALE} is {scale.stored.dtype} {list(scale.stored.shape)}, not float32 of one number by output"
    elif not (np.isfinite(values := scale.read()) & (values > 0)).all():
        yield f"{name}{SCALE} has a number that is not positive and finite"
    if len(weight.stored.shape) != 2 or is_nan(weight.bits()).any():
        yield f"{name}{WEIGHT} has codes that are NaN, or is no matrix"
