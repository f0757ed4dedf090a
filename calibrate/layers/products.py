"""Arithmetic of 8-bit layers: dynamic codes, whose scale comes from the input itself, and exact sums of products.

A CPU with VNNI sums products of int8 numbers in int32. Other CPUs sum products in float32, which is exact while every
partial sum is a whole number below 2**24: up to 1032 products. Longer sums are split into pieces, and the sums of the
pieces are added as int32.

Convolutions are summed in float32 pieces on CPUs where torch has oneDNN, and in float64 elsewhere. oneDNN's direct
algorithm only adds products; the Winograd transform, which other libraries may choose, would round in float32.

Products of FP8 codes are summed in float64 on the CPU. A product of two e4m3 numbers is a multiple of 2**-18 below
2**18, so sums of up to 2**17 products are exact in any order. On other devices they are summed in float32.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheme import WEIGHT, Scheme, block_scales, in_float32

_SMALLEST = 2.0**-126  # the smallest normal float32
_PIECE = 1024  # products in one float32 sum, exact since 1024 * 128 * 127 < 2**24


def dynamic_codes(x: Tensor, axes: tuple[int, ...], scheme: Scheme = WEIGHT) -> tuple[Tensor, Tensor]:
    """Returns the codes of `x` in float32 and their scale. The scale is max |x| over `axes`, divided by the largest
    code of `scheme`; it has length 1 along these axes. By default `scheme` has the codes -127 to 127, as for weights.

    Where all values are zero, or too small for a normal float32 scale, the codes are zeros and the scale is 1.
    """
    x = x.to(torch.float32)
    if scheme.block is not None:
        blocks = block_scales(x.unflatten(-1, (-1, scheme.block)).abs().amax(-1), scheme.clamping)
        scale = blocks.repeat_interleave(scheme.block, -1)
        return scheme.nearest_(x / scale), scale
    return codes_up_to(x, x.abs().amax(axes, keepdim=True), scheme)


def codes_up_to(x: Tensor, largest: Tensor, scheme: Scheme = WEIGHT) -> tuple[Tensor, Tensor]:
    """Returns the codes of `x`, float32, and their scale, with which `largest` becomes the largest code of `scheme`.
    `largest` broadcasts against `x`. Where it is too small for a normal float32 scale, the scale is 1."""
    # qmax is a tensor of the device: GPUs divide by a number of the host by multiplying with its rounded reciprocal
    scale = largest / x.new_full((), scheme.qmax)
    scale = torch.where(scale < _SMALLEST, 1.0, scale)
    return scheme.nearest_(x / scale), scale


@cache
def sums_in_int32() -> bool:
    """Returns whether this CPU has VNNI, instructions that sum products of int8 numbers in int32. A CPU without VNNI
    sums pairs of products in int16, which saturates."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def integer_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the exact product, int32 (..., out), of codes `q` (..., in) and an int8 `weight` (out, in). The codes are
    int8 or whole numbers in float32."""
    # with one input channel, torch 2.13 mistakes a transposed weight for one that is not transposed
    if q.device.type == "cpu" and q.numel() and weight.shape[1] > 1 and sums_in_int32():
        rows = q.reshape(-1, q.shape[-1]).to(torch.int8)
        return torch._int_mm(rows, weight.t()).view(*q.shape[:-1], -1)
    return _in_float(q, weight)


def float_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the product, float32 (..., out), of FP8 codes or the values that codes stand for: `q` (..., in) and
    `weight` (out, in). On the CPU, sums are computed in float64 and rounded once."""
    kind = torch.float64 if q.device.type == "cpu" else torch.float32
    return F.linear(q.to(kind), in_float32(weight).to(kind)).to(torch.float32)


def code_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the product of codes `q` (..., in) and `weight` (out, in): int32 by `integer_matmul` if the dtype of
    `weight` is int8, else float32 by `float_matmul`."""
    return integer_matmul(q, weight) if weight.dtype == torch.int8 else float_matmul(q, weight)


def float_convolution(
    q: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tensor:
    """Returns the convolution, float32 (batch, out, height, width), of padded FP8 codes `q` (batch, in, height, width)
    with FP8 codes `weight` (out, in / groups, height, width). On the CPU, sums are computed in float64 and rounded
    once; on other devices in float32. `stride`, `dilation` and `groups` are those of the convolution."""
    kind = torch.float64 if q.device.type == "cpu" else torch.float32
    return F.conv2d(q.to(kind), in_float32(weight).to(kind), None, stride, 0, dilation, groups).to(torch.float32)


def _in_float(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the exact product, int32 (..., out), of codes `q` (..., in) and an int8 `weight` (out, in). Adds up
    float32 sums of at most 1024 products each, because sums of so few products are exact."""
    total: Tensor | None = None
    for start in range(0, weight.shape[1], _PIECE):
        piece = weight[:, start : start + _PIECE].to(torch.float32)
        part = F.linear(q[..., start : start + _PIECE].to(torch.float32), piece).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def integer_convolution(
    q: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tensor:
    """Returns the exact convolution, int32 (batch, out, height, width), of codes `q` (batch, in, height, width) with an
    int8 `weight` (out, in / groups, height, width). The codes are whole numbers in float32, and already have the
    padding. `stride`, `dilation` and `groups` are those of the convolution."""
    channels, taps = weight.shape[1], weight[0, 0].numel()
    if not (q.device.type == "cpu" and torch.backends.mkldnn.is_available() and q.numel() and taps <= _PIECE):
        return F.conv2d(q.double(), weight.double(), None, stride, 0, dilation, groups).to(torch.int32)
    total: Tensor | None = None
    for start in range(0, channels, step := _PIECE // taps):
        piece, inputs = weight[:, start : start + step].to(torch.float32), q
        if step < channels:
            inputs = q.unflatten(1, (groups, channels))[:, :, start : start + step].flatten(1, 2)
        part = torch.mkldnn_convolution(inputs, piece, None, (0, 0), stride, dilation, groups).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
