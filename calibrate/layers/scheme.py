"""The quantization formula of this package, and its parameters for a range.

    q = clamp(round(x / scale + zero_point), qmin, qmax)          x ~ (q - zero_point) * scale

Quotient and sum are float32 numbers, each rounded by itself; round is to the nearest whole number, ties to even. The
order is that of Ascend's operators (npu_quantize, AscendQuant). To round before the zero point is added gives another
code where x / scale is a whole number and a half and zero_point is odd, or where the sum rounds to a half.

A scale is computed in float64, then rounded up to a value of the dtype it is stored in; everything else is derived from
the stored scale. Rounding up clamps no value inside the range: the error there is at most scale / 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .reciprocals import next_scale

STORABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of models, in which scales may be stored
_PIECE = 1 << 15  # values that are quantized at once
_BITS = {2: torch.int16, 4: torch.int32}  # the integer dtype with a float's bits, by bytes of an element
_MAX_INFLATION = 1.25  # a stored scale above this multiple of the exact one wastes too many of the 256 codes


@dataclass(frozen=True)
class Element:
    """The numbers that codes are: `dtype` holds them, `lowest` and `highest` bound them."""

    dtype: torch.dtype
    lowest: int
    highest: int

    def round_(self, x: Tensor) -> Tensor:
        """Rounds float32 values to the nearest of these numbers, ties to even, in place; bounds are ignored."""
        return x.round_()


INT8 = Element(torch.int8, -128, 127)


@dataclass(frozen=True)
class Scheme:
    """The rule by which a tensor becomes codes.

    | field      | meaning                                                                           |
    |------------|-----------------------------------------------------------------------------------|
    | element    | the set of numbers that codes are taken from                                      |
    | symmetric  | zero_point is 0 and the scale follows the larger end of the range                 |
    | axis       | None: one scale for the tensor; 0: one for each output channel                    |
    | narrow     | qmin is -qmax, so that no code lacks its negative (weights)                       |
    | reciprocal | float32 scales are such that multiplying by 1 / scale makes the codes of          |
    |            | dividing (`reciprocals`)                                                          |
    """

    element: Element = INT8
    symmetric: bool = True
    axis: int | None = None
    narrow: bool = False
    reciprocal: bool = False

    @property
    def qmax(self) -> int:
        return self.element.highest

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else self.element.lowest

    def nearest_(self, x: Tensor) -> Tensor:
        """Rounds x / scale + zero_point to the nearest codes, in place."""
        return self.element.round_(x).clamp_(self.qmin, self.qmax)


WEIGHT = Scheme(symmetric=True, axis=0, narrow=True)
ACTIVATION = Scheme(symmetric=False)
SYMMETRIC_ACTIVATION = Scheme(symmetric=True)


class QParams(NamedTuple):
    """Parameters of the formula: `scale` float32 and `zero_point` int32, both 0-d, or of shape (channels,)."""

    scale: Tensor
    zero_point: Tensor


class Range(NamedTuple):
    """A range: the smallest and the largest value to represent."""

    low: float
    high: float


def quantize(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """The codes of `x` (one dimension or more), in the dtype of the scheme's element. Computed in float32; a
    per-channel scale goes along `scheme.axis`.
    """
    scale, zero_point = (_along(parameter, x, scheme).expand(x.shape) for parameter in qparams)
    q = torch.empty(x.shape, dtype=scheme.element.dtype, device=x.device)
    # in pieces: float32 of a whole weight leaves holes between the integers that stay, which malloc does not fill again
    rows = max(1, _PIECE * len(x) // max(x.numel(), 1))
    for out, *given in zip(*(each.split(rows) for each in (q, x, scale, zero_point)), strict=True):
        out.copy_(_codes(given[0], given[1], given[2], scheme))
    return q


def codes(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """The integers of `x`, held in float32."""
    return _codes(x, _along(qparams.scale, x, scheme), _along(qparams.zero_point, x, scheme), scheme)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    return scheme.nearest_(divided(x, scale).add_(zero_point))


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in float32, as a new tensor."""
    return x / scale if x.dtype == torch.float32 else x.to(torch.float32).div_(scale)


def dequantize(q: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """The float32 values that the integers stand for."""
    scale, zero_point = _along(qparams.scale, q, scheme), _along(qparams.zero_point, q, scheme)
    return (q.to(torch.float32) - zero_point) * scale


def _along(parameter: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    if scheme.axis is None or parameter.ndim == 0:
        return parameter
    return parameter.view([-1 if axis == scheme.axis else 1 for axis in range(x.ndim)])


def exact_scale(extent: Range, scheme: Scheme) -> float:
    """The scale at which a range, widened to contain zero, fills all codes; 0.0 for the range 0.0 to 0.0."""
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    if scheme.symmetric:
        return max(-low, high) / scheme.qmax
    return high / (scheme.qmax - scheme.qmin) - low / (scheme.qmax - scheme.qmin)  # high - low may overflow


def qparams_of(extent: Range, scheme: Scheme, dtype: torch.dtype) -> QParams | None:
    """The parameters for a range, which is widened to contain zero; None where `dtype` cannot hold the scale.

    The scale is a value of `dtype`. The range 0.0 to 0.0 has scale 1. Raises ValueError for a range that is not finite
    or upside down.
    """
    if not (math.isfinite(extent.low) and math.isfinite(extent.high) and extent.low <= extent.high):
        raise ValueError(f"not a range: {extent.low} to {extent.high}")
    scale = 1.0 if extent == (0.0, 0.0) else exact_scale(extent, scheme)
    return stored_qparams(scale, min(extent.low, 0.0), dtype, scheme)


def stored_qparams(scale: float, low: float, dtype: torch.dtype, scheme: Scheme) -> QParams | None:
    """The parameters with the next scale of `dtype` that is not below `scale`, which represent values from `low` on;
    None where `dtype` cannot hold such a scale. For a `reciprocal` scheme and float32, `reciprocals` chooses the scale.
    """

    def zero_point(stored: float) -> int:
        wanted = 0 if scheme.symmetric else scheme.qmin - round(low / stored)
        return min(max(wanted, scheme.qmin), scheme.qmax)

    stored = stored_scale(scale, dtype)
    if stored is not None and scheme.reciprocal and dtype == torch.float32:
        stored = next_scale(stored, zero_point)
    if stored is None:
        return None
    return QParams(torch.tensor(stored, dtype=torch.float32), torch.tensor(zero_point(stored), dtype=torch.int32))


def stored_scale(scale: float, dtype: torch.dtype) -> float | None:
    """The smallest value of `dtype` that is not below `scale`; None where there is no such value near `scale`.

    float16 has nothing between 0 and 6e-8, and few values up to 6e-5: a scale there would be lost or grow by half.
    """
    stored = torch.tensor(scale, dtype=torch.float64).to(dtype)
    if stored.double().item() < scale:
        bits = stored.view(_BITS[dtype.itemsize])
        stored = (bits + 1).view(dtype)  # positive floats are ordered as their bits are
    value = stored.double().item()
    if not 0.0 < value < math.inf or value > scale * _MAX_INFLATION:
        return None
    if value < torch.finfo(torch.float32).smallest_normal:
        return None  # the formula divides in float32, where devices flush such a number to zero
    return value
