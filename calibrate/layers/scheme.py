"""The quantization formula of this package, and its parameters for a range.

    q = clamp(round(x / scale + zero_point), qmin, qmax)          x ~ (q - zero_point) * scale

The quotient and the sum are each rounded to float32; `round` rounds to the nearest whole number, ties to even. This
order of operations is that of Ascend's operators (npu_quantize, AscendQuant). Rounding the quotient before the zero
point is added would give another code in two cases: where x / scale lies halfway between two whole numbers and
zero_point is odd, and where the sum in float32 is rounded to a half.

A scale is computed in float64, then rounded up to a value of the dtype that stores it; all other numbers are derived
from the stored scale. Because scales are rounded up, no value inside the range is clamped, and the error there is at
most scale / 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .reciprocals import next_scale

STORABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of float models; a scale may be stored in each
_PIECE = 1 << 15  # values of a tensor that are quantized together
_BITS = {2: torch.int16, 4: torch.int32}  # by the bytes of a float dtype: the integer dtype of the same size
_MAX_INFLATION = 1.25  # largest ratio of a stored to an exact scale: above it a fifth of the 256 codes is unused


@dataclass(frozen=True)
class Element:
    """A set of integers that codes are taken from: those from `lowest` to `highest`. `dtype` is the dtype that stores a
    code."""

    dtype: torch.dtype
    lowest: int
    highest: int

    def round_(self, x: Tensor) -> Tensor:
        """Rounds float32 values in place to the nearest integers, ties to even; ignores the bounds of the codes."""
        return x.round_()


INT8 = Element(torch.int8, -128, 127)


@dataclass(frozen=True)
class Scheme:
    """The rule by which one tensor becomes codes. (A name such as W8A8 stands for the rules of a layer's weight and
    input together.)

    | field      | meaning                                                                           |
    |------------|-----------------------------------------------------------------------------------|
    | element    | the set of numbers that codes are taken from                                      |
    | symmetric  | zero_point is 0 and the scale follows the larger end of the range                 |
    | axis       | None: one scale for the tensor; 0: one for each output channel                    |
    | narrow     | qmin is -qmax, so that the negative of every code is a code (weights)             |
    | reciprocal | float32 scales are chosen so that multiplying by 1 / scale gives the same codes   |
    |            | as dividing by the scale (`reciprocals`)                                          |
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
        """Rounds `x` in place to the nearest codes; values outside the codes become the lowest or the highest code of
        the rule. The values of `x` have already been divided by the scale, and the zero point added."""
        return self.element.round_(x).clamp_(self.qmin, self.qmax)


WEIGHT = Scheme(symmetric=True, axis=0, narrow=True)
ACTIVATION = Scheme(symmetric=False)
SYMMETRIC_ACTIVATION = Scheme(symmetric=True)


class QParams(NamedTuple):
    """Holds the parameters of the quantization formula: `scale` float32 and `zero_point` int32, of the same shape: 0-d,
    or 1-d with a number for each channel, timestep bin or row."""

    scale: Tensor
    zero_point: Tensor


class Range(NamedTuple):
    """The smallest and the largest value that codes have to represent."""

    low: float
    high: float


def quantize(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """Returns the codes of `x`, which has at least one dimension, as integers of the dtype of `scheme.element`. If
    `qparams` has a scale for each channel, the channels are dimension `scheme.axis` of `x`. Computes in float32."""
    scale, zero_point = (_broadcast(parameter, x, scheme).expand(x.shape) for parameter in qparams)
    q = torch.empty(x.shape, dtype=scheme.element.dtype, device=x.device)
    # in pieces: freed float32 copies of whole weights leave holes between the int8 weights, which malloc cannot reuse
    rows = max(1, _PIECE * len(x) // max(x.numel(), 1))
    for out, *parameters in zip(*(tensor.split(rows) for tensor in (q, x, scale, zero_point)), strict=True):
        out.copy_(_codes(parameters[0], parameters[1], parameters[2], scheme))
    return q


def codes(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """Returns the codes of `x` by the rule `scheme`, with the scales and zero points `qparams`, as whole numbers in
    float32. `quantize` returns the same codes in an integer dtype."""
    return _codes(x, _broadcast(qparams.scale, x, scheme), _broadcast(qparams.zero_point, x, scheme), scheme)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    return scheme.nearest_(divided(x, scale).add_(zero_point))


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x / scale in float32, as a new tensor."""
    return x / scale if x.dtype == torch.float32 else x.to(torch.float32).div_(scale)


def dequantize(q: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """Returns the float32 values that the codes `q` stand for, with the scales and zero points `qparams`. If there is a
    scale for each channel, the channels are dimension `scheme.axis` of `q`."""
    scale, zero_point = _broadcast(qparams.scale, q, scheme), _broadcast(qparams.zero_point, q, scheme)
    return (q.to(torch.float32) - zero_point) * scale


def _broadcast(parameter: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """Returns `parameter`, scales or zero points of channels, reshaped to broadcast against `x` along dimension
    `scheme.axis`; unchanged if it is 0-d or `scheme.axis` is None."""
    if scheme.axis is None or parameter.ndim == 0:
        return parameter
    return parameter.view([-1 if axis == scheme.axis else 1 for axis in range(x.ndim)])


def exact_scale(extent: Range, scheme: Scheme) -> float:
    """Returns the scale at which the codes of `scheme` just cover the range `extent`, widened to contain zero; 0.0 for
    the range 0.0 to 0.0. The scale is not yet rounded to the dtype in which it will be stored."""
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    if scheme.symmetric:
        return max(-low, high) / scheme.qmax
    return high / (scheme.qmax - scheme.qmin) - low / (scheme.qmax - scheme.qmin)  # high - low may overflow


def qparams_of(extent: Range, scheme: Scheme, dtype: torch.dtype) -> QParams | None:
    """Returns scale and zero point for the range `extent`, widened to contain zero. `scheme` says which codes there are
    and whether the range is symmetric.

    The scale is a value of `dtype`. The range 0.0 to 0.0 has scale 1. Returns None if `dtype` cannot store the scale.
    Raises ValueError for a range with ends that are not finite or in the wrong order.
    """
    if not (math.isfinite(extent.low) and math.isfinite(extent.high) and extent.low <= extent.high):
        raise ValueError(f"not a range: {extent.low} to {extent.high}")
    scale = 1.0 if extent == (0.0, 0.0) else exact_scale(extent, scheme)
    return stored_qparams(scale, min(extent.low, 0.0), dtype, scheme)


def stored_qparams(scale: float, low: float, dtype: torch.dtype, scheme: Scheme) -> QParams | None:
    """Returns scale and zero point. The scale is the smallest one not below `scale` that `dtype` can store. The zero
    point is 0 for a symmetric `scheme`, otherwise the one with which the lowest code stands for about `low`. Returns
    None if `dtype` cannot store such a scale.

    For a scheme with `reciprocal` and float32, the scale is raised until multiplying by its reciprocal gives the same
    codes as dividing by it.
    """

    def zero_point(stored: float) -> int:
        nearest = 0 if scheme.symmetric else scheme.qmin - round(low / stored)
        return min(max(nearest, scheme.qmin), scheme.qmax)

    stored = stored_scale(scale, dtype)
    if stored is not None and scheme.reciprocal and dtype == torch.float32:
        stored = next_scale(stored, zero_point)
    if stored is None:
        return None
    return QParams(torch.tensor(stored, dtype=torch.float32), torch.tensor(zero_point(stored), dtype=torch.int32))


def stored_scale(scale: float, dtype: torch.dtype) -> float | None:
    """Returns the smallest value of `dtype` that is not below `scale`. Returns None if this value is infinite, more
    than 25 % above `scale`, or below the normal float32 numbers.

    The 25 % matter in float16, whose values below 6e-5 are 6e-8 apart: rounding up could make so small a scale twice as
    large.
    """
    stored = torch.tensor(scale, dtype=torch.float64).to(dtype)
    if stored.double().item() < scale:
        bits = stored.view(_BITS[dtype.itemsize])
        stored = (bits + 1).view(dtype)  # positive floats have the order of their bits
    value = stored.double().item()
    if not 0.0 < value < math.inf or value > scale * _MAX_INFLATION:
        return None
    if value < torch.finfo(torch.float32).smallest_normal:
        return None  # the formula divides in float32, where devices flush such a number to zero
    return value
