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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .reciprocals import next_scale
from .schemes import BLOCK

STORABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of float models; a scale may be stored in each
_PIECE = 1 << 15  # values of a tensor that are quantized together
_BITS = {2: torch.int16, 4: torch.int32}  # by the bytes of a float dtype: the integer dtype of the same size
_EXPONENT = 0x7F800000  # mask of the exponent's bits of a float32
_LARGEST_EXPONENT = 8  # floor of log2 of 448, the largest number of e4m3
_MAX_INFLATION = 1.25  # largest ratio of a stored to an exact scale: above it a fifth of the 256 codes is unused


@dataclass(frozen=True)
class Element:
    """An element type: the set of numbers that codes are taken from, here the integers from `lowest` to `highest`.

    `name` is its name in `schemes.NAMES`, `dtype` the dtype that stores a code. `block` is the number of neighbouring
    channels that share a scale, which is then a power of two; None: a scale belongs to a whole tensor, or to an output
    channel of a weight, or to a token of an input.
    """

    name: str
    dtype: torch.dtype
    lowest: int
    highest: int
    block: int | None = None
    integer: ClassVar[bool] = True  # whether codes are whole numbers

    def round_(self, x: Tensor) -> Tensor:
        """Rounds float values in place to the nearest integers, ties to even; ignores the bounds of the codes."""
        return x.round_()


@dataclass(frozen=True)
class FloatElement(Element):
    """An element type whose codes are the floating-point numbers of `dtype` from `lowest` to `highest`."""

    integer: ClassVar[bool] = False

    def round_(self, x: Tensor) -> Tensor:
        """Rounds float values in place to the nearest numbers of `dtype`, ties to even mantissas; values beyond
        `lowest` and `highest` become these. Gives the numbers that torch's cast to `dtype` gives, several times as
        fast."""
        if x.numel() > _PIECE and x.is_contiguous():
            for piece in x.view(-1).split(_PIECE):  # pieces stay in the cache between the steps
                self.round_(piece)
            return x
        smallest, digits = torch.finfo(self.dtype).smallest_normal, 1.5 * 2.0**23 * torch.finfo(self.dtype).eps
        rounded = x.to(torch.float32).clamp(self.lowest, self.highest)
        power = rounded.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)  # the power of two below |x|
        shift = power.clamp_min_(smallest).mul_(digits)  # so large that adding it rounds to the last digit of `dtype`
        return x.copy_(rounded.add_(shift).sub_(shift))


INT8 = Element("int8", torch.int8, -128, 127)
# OCP 8-bit Floating Point Specification, 2023: e4m3 has no infinities, and 448 is its largest number
FP8 = FloatElement("fp8", torch.float8_e4m3fn, -448, 448)
# OCP Microscaling Formats Specification, 2023: 32 numbers of e4m3 share a power of two
MXFP8 = FloatElement("mxfp8", torch.float8_e4m3fn, -448, 448, block=BLOCK)
_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32)  # by its bits
ELEMENT_TYPES = {element.name: element for element in (INT8, FP8, MXFP8)}


@dataclass(frozen=True)
class Scheme:
    """The rule by which one tensor becomes codes. (A name such as W8A8 stands for the rules of a layer's weight and
    input together.)

    | field      | meaning                                                                           |
    |------------|-----------------------------------------------------------------------------------|
    | element    | the set of numbers that codes are taken from                                      |
    | symmetric  | zero_point is 0 and the scale follows the larger end of the range                 |
    | axis       | None: one scale for the tensor; 0: one for each output channel, or, if the        |
    |            | element type has blocks, for each block of each output channel                    |
    | narrow     | qmin is -qmax, so that the negative of every code is a code (weights)             |
    | reciprocal | float32 scales are chosen so that multiplying by 1 / scale gives the same codes   |
    |            | as dividing by the scale (`reciprocals`)                                          |
    | clamping   | the scale of a block may be so small that its largest code is clamped             |
    |            | (`block_scales`), as Ascend's npu_dynamic_mx_quant chooses it                     |
    | per_tensor | all output channels of a weight have the same scale; the rule of an input says so |
    |            | about the weight of the same layer                                                |
    | largest    | set if per_tensor is True and several weights share a scale: the largest absolute |
    |            | value in all of them, which the scale covers; None: the scale is the weight's own |
    """

    element: Element = INT8
    symmetric: bool = True
    axis: int | None = None
    narrow: bool = False
    reciprocal: bool = False
    per_tensor: bool = False
    largest: float | None = None
    clamping: bool = False

    @property
    def block(self) -> int | None:
        """The number of neighbouring channels that share a scale; None without blocks."""
        return self.element.block

    @property
    def qmax(self) -> int:
        return self.element.highest

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else self.element.lowest

    def nearest_(self, x: Tensor) -> Tensor:
        """Rounds `x` in place to the nearest codes. Values outside the codes become the lowest or the highest code. The
        values of `x` have already been divided by the scale, and the zero point added."""
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

    def times(self, factor: float) -> "Range":
        """Returns the range of the values of this range times `factor`."""
        return Range(self.low * factor, self.high * factor)


def quantize(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """Returns the codes of `x`, which has at least one dimension, in the dtype of `scheme.element`. If `qparams` has a
    scale for each channel, the channels are dimension `scheme.axis` of `x`; if it has one for each block, the blocks
    are along the last dimension of both. Computes in float32."""
    scale, zero_point = (_broadcast(parameter, x, scheme).expand(x.shape) for parameter in qparams)
    q = torch.empty(x.shape, dtype=scheme.element.dtype, device=x.device)
    # in pieces: freed float32 copies of whole weights leave holes between the int8 weights, which malloc cannot reuse
    rows = max(1, _PIECE * len(x) // max(x.numel(), 1))
    for out, *parameters in zip(*(tensor.split(rows) for tensor in (q, x, scale, zero_point)), strict=True):
        out.copy_(_codes(parameters[0], parameters[1], parameters[2], scheme))
    return q


def codes(x: Tensor, qparams: QParams, scheme: Scheme) -> Tensor:
    """Returns the codes of `x` by the rule `scheme`, with the scales and zero points `qparams`, in float32. `quantize`
    returns the same codes in the dtype of `scheme.element`."""
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
    return (in_float32(q) - zero_point) * scale


def in_float32(codes: Tensor) -> Tensor:
    """Returns codes of any element type in float32, in which all are exact."""
    if codes.dtype != FP8.dtype or codes.device.type != "cpu":
        return codes.to(torch.float32)
    # torch converts one number of e4m3 after another, which takes four times as long as a table
    bits = codes.contiguous().view(torch.uint8)
    return _E4M3.index_select(0, bits.view(-1).to(torch.int32)).view(codes.shape)


def _broadcast(parameter: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """Returns `parameter`, scales or zero points of channels, reshaped to broadcast against `x` along dimension
    `scheme.axis`; unchanged if it is 0-d or `scheme.axis` is None. If `parameter` has a number for each block of
    channels, the number is repeated for each channel of the block."""
    if scheme.block is not None and parameter.ndim > 0:
        return parameter if parameter.shape == x.shape else parameter.repeat_interleave(scheme.block, -1)
    if scheme.axis is None or parameter.ndim == 0:
        return parameter
    return parameter.view([-1 if axis == scheme.axis else 1 for axis in range(x.ndim)])


def block_scales(largest: Tensor, clamping: bool = False) -> Tensor:
    """Returns the scale of each block of e4m3 codes, a float32 power of two, from `largest`, the largest absolute
    values of the blocks: the smallest scale with which this value is at most 448 codes, so that no code is clamped. The
    scale of a block of zeros is 1.

    With `clamping`, the scale is half as large if `largest` is then between 448 and 512 codes, as in the OCP
    Microscaling Formats Specification, 2023, section 6.3: the exponent is the floor of log2 of the largest value, minus
    that of the largest code. Exponents are limited to -126 to 127, so that a scale is a normal float32 number.
    """
    largest = largest.to(torch.float32)
    exponent = torch.frexp(largest).exponent - (_LARGEST_EXPONENT + 1)
    if not clamping:
        exponent += largest > torch.ldexp(torch.full_like(largest, FP8.highest), exponent)
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 127))
    return torch.where(largest > 0, scale, 1.0)


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
    """Returns a scale that `dtype` can store, and its zero point; None if `dtype` cannot store a suitable scale. The
    scale is the smallest one not below `scale`. If `scheme` is symmetric, the zero point is 0. Otherwise the zero point
    is chosen so that the lowest code stands for about `low`, the lower end of the range.

    If `scheme.reciprocal` is True and `dtype` is float32, the scale is raised until multiplying by 1 / scale gives the
    same codes as dividing by the scale.
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

    The 25 % matter in float16. Its values below 6e-5 are 6e-8 apart, so rounding up could make so small a scale twice
    as large.
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
