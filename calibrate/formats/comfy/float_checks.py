"""Finds the faults of the FP8 and MXFP8 layers in a file for ComfyUI. Each check is a function that yields the faults
in words. Importing this module needs no torch."""

from collections.abc import Iterator

import numpy as np

from octavo.capture.arrays import Array, read_array
from octavo.capture.store.headers import Stored

from ...layers.schemes import BLOCK
from ..e4m3 import is_nan
from .structure import FP8, FULL_PRECISION, MXFP8, OLD_NAMES, Content

_TILE = (128, 4)  # rows and blocks of a tile of scales
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_E8M0 = ("uint8", "float8_e8m0fnu")  # dtypes in which ComfyUI reads exponents of powers of two
_SIGMAS = 12.0  # standard deviations between two sums of squares that chance does not explain
# tensors that other programs write beside FP8 weights, and that ComfyUI drops
DROPPED = ("pre_quant_scale", "input_offset", "smooth_factor", "mul_scale", "weight_zero_point", "weight_offset")


def float_layers(content: Content) -> dict[str, str]:
    """Returns a dict from the name of each FP8 or MXFP8 layer to its kind, FP8 or MXFP8."""
    return {name: kind for kind in (FP8, MXFP8) for name in content.of(kind)}


def markers(content: Content) -> Iterator[str]:
    """Yields the faults of markers: FP8 codes that have a scale but no marker, and markers on other weights."""
    known = content.effective
    for name in content.fp8_weights:
        leaves = [leaf for leaf in ("weight_scale", *OLD_NAMES) if content.tensor(name, leaf)]
        if name not in known and leaves:
            yield f"{name}.weight is {FP8} without a marker; ComfyUI silently takes the codes for weights"
    for name, kind in float_layers(content).items():
        weight = content.tensor(name, "weight")
        if weight is not None and weight.dtype != FP8:
            yield f"{name}.weight is {weight.dtype}, not {FP8}; ComfyUI silently rounds it to this dtype"
        elif weight is not None and len(weight.shape) != 2:
            yield f"{name}.weight is {kind} and no matrix; ComfyUI silently takes the codes for weights"


def scales(content: Content) -> Iterator[str]:
    """Yields the faults of weight scales: missing, of a dtype or shape that ComfyUI does not read, or not positive and
    finite."""
    for name, kind in float_layers(content).items():
        weight, scale = content.tensor(name, "weight"), content.tensor(name, "weight_scale")
        if weight is None or len(weight.shape) != 2:
            continue
        if scale is None:
            yield f"{name}.weight_scale is missing; ComfyUI fails"
        elif kind == FP8:
            yield from _single(content, f"{name}.weight_scale", scale, "takes one for a whole weight, and fails")
        else:
            yield from _blocks(content, name, weight, scale)


def _single(content: Content, name: str, scale: Stored, need: str) -> Iterator[str]:
    """Yields a fault if the tensor `scale`, called `name`, is not one positive number in a float dtype. `need`, the end
    of the message about a wrong shape, says how many numbers ComfyUI takes."""
    if scale.dtype not in _FLOATS:
        yield f"{name} is {scale.dtype}, not float32"
    elif scale.shape not in ((), (1,)):
        yield f"{name} has shape {list(scale.shape)}, but ComfyUI {need}"
    elif not (np.isfinite(value := read_array(content.path, scale)) & (value > 0)).all():
        yield f"{name} is not positive and finite"


def _blocks(content: Content, name: str, weight: Stored, scale: Stored) -> Iterator[str]:
    """Yields the fault of the scales of an MXFP8 layer, or of the shape of its weight."""
    rows, width = weight.shape
    shape = _filled(rows, width)
    if width % BLOCK:
        yield f"{name}.weight has {width} columns, not a multiple of {BLOCK}; ComfyUI refuses it"
    elif scale.dtype not in _E8M0:
        yield f"{name}.weight_scale is {scale.dtype}, not uint8 or float8_e8m0fnu"
    elif scale.shape == (rows, width // BLOCK) != shape:
        yield f"{name}.weight_scale is not in tiles of 128 x 4 (shape {list(scale.shape)}, not {list(shape)})"
    elif scale.shape != shape:
        yield f"{name}.weight_scale has shape {list(scale.shape)}, not {list(shape)}"
    elif (_exponents(content, scale)[:rows, : width // BLOCK] == 0xFF).any():
        yield f"{name}.weight_scale has a scale that is not a number"


def _filled(rows: int, width: int) -> tuple[int, int]:
    """Returns the shape (rows, blocks) of the scales of an MXFP8 weight (rows, width), filled up to multiples of 128
    rows and 4 blocks."""
    blocks = width // BLOCK
    return rows + -rows % _TILE[0], blocks + -blocks % _TILE[1]


def _exponents(content: Content, scale: Stored) -> Array:
    """Reads scales that are powers of two, stored in the order in which cuBLAS reads tiles of 128 x 4. Returns their
    exponents plus 127, uint8 (rows, blocks), in the order of the weight's rows and blocks."""
    stored = read_array(content.path, scale._replace(dtype="uint8"))
    rows, blocks = stored.shape
    tiles = stored.reshape(rows // 128, blocks // 4, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, blocks)


def inputs(content: Content) -> Iterator[str]:
    """Yields a fault for each FP8 layer whose input scale is missing, in which case ComfyUI takes 1, or not one
    positive number. Layers whose inputs stay float are left out, because ComfyUI ignores their input scales."""
    for name, marker in content.of(FP8).items():
        scale = content.tensor(name, "input_scale")
        if marker.get(FULL_PRECISION):
            continue
        if scale is None:
            yield f"{name}.input_scale is missing; ComfyUI silently takes 1, and cuts inputs off at 448"
        else:
            yield from _single(content, f"{name}.input_scale", scale, "takes one for all inputs")


def codes(content: Content) -> Iterator[str]:
    """Yields a fault for each FP8 or MXFP8 layer with a code that is NaN."""
    for name in float_layers(content):
        weight = content.tensor(name, "weight")
        if weight is None or weight.dtype != FP8:
            continue
        if is_nan(read_array(content.path, weight._replace(dtype="uint8"))).any():
            yield f"{name}.weight has codes that are NaN"


def order(content: Content) -> Iterator[str]:
    """Yields a fault if the scales of the MXFP8 layers are stored row by row, not in tiles, although their shape fits
    both.

    If a matrix of scales was filled up, the positions of the zeros show the order. If not, statistics of the exponents
    do: the rows of a weight differ in size, and so do its columns, so the means of their exponents vary more in the
    right order than in the wrong one. `_structure` measures this variation for both orders, and its sums over all
    layers are compared.
    """
    tiled, plain, freedom = 0.0, 0.0, 0
    for name in content.of(MXFP8):
        weight, scale = content.tensor(name, "weight"), content.tensor(name, "weight_scale")
        if weight is None or scale is None or len(weight.shape) != 2 or scale.dtype not in _E8M0:
            continue
        rows, blocks = weight.shape[0], weight.shape[1] // BLOCK
        if scale.shape != _filled(*weight.shape):
            continue
        stored = read_array(content.path, scale._replace(dtype="uint8"))
        ordered = _exponents(content, scale)
        if _outside(ordered, rows, blocks) and not _outside(stored, rows, blocks):
            yield f"{name}.weight_scale is in rows, not in tiles of 128 x 4, which ComfyUI silently reads"
        if stored.shape == (rows, blocks):
            tiled, plain = tiled + _structure(ordered), plain + _structure(stored)
            freedom += rows + blocks - 2
    if plain - tiled > _SIGMAS * (2 * freedom) ** 0.5:
        yield "the scales of MXFP8 layers seem to be in rows, not in tiles of 128 x 4, which ComfyUI silently reads"


def _outside(matrix: Array, rows: int, blocks: int) -> bool:
    """Returns whether there is a number other than zero beyond the first `rows` and `blocks` of a filled matrix."""
    return bool(matrix[rows:].any() or matrix[:, blocks:].any())


def _structure(exponents: Array) -> float:
    """Returns how much the rows and the columns of a matrix of exponents differ: the sum of squares between rows and
    between columns, divided by the variance. For random exponents the result is about the number of rows plus that of
    columns."""
    values = exponents.astype(np.float64)
    values[exponents == 0] = np.median(values)  # blocks of zeros
    variance, mean = values.var(), values.mean()
    if variance == 0:
        return float(sum(values.shape) - 2)
    squares = sum(values.shape[axis] * np.square(values.mean(axis) - mean).sum() for axis in (0, 1))
    return float(squares / variance)


def dropped(content: Content) -> Iterator[str]:
    """Yields a fault for each tensor of an FP8 or MXFP8 layer that ComfyUI ignores although the output depends on it,
    such as a smoothing multiplier."""
    for name in dict.fromkeys([*float_layers(content), *content.fp8_weights]):
        for leaf in DROPPED:
            if content.tensor(name, leaf):
                yield f"{name}.{leaf} is silently dropped by ComfyUI, so the output is wrong"
