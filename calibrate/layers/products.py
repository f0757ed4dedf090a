"""Arithmetic of integer layers: dynamic codes, whose scale comes from the input itself, and exact sums of products.

A CPU with VNNI sums products of int8 numbers in int32. Other CPUs sum products in float32, which is exact while every
partial sum is a whole number below 2**24: up to 1032 products. Longer sums are split into pieces, and the sums of the
pieces are added as int32.

Convolutions are summed in float32 pieces on CPUs where torch has oneDNN, and in float64 elsewhere. oneDNN's direct
algorithm only adds products; the Winograd transform, which other libraries may choose, would round in float32.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheme import WEIGHT, Scheme

_SMALLEST = 2.0**-126  # the smallest normal float32
_PIECE = 1024  # products in one float32 sum, exact since 1024 * 128 * 127 < 2**24


def dynamic_codes(x: Tensor, axes: tuple[int, ...], scheme: Scheme = WEIGHT) -> tuple[Tensor, Tensor]:
    """Returns the codes of `x` in float32 and their scale. The scale is max |x| over `axes`, divided by the largest
    code of `scheme`; it has length 1 along these axes. By default `scheme` has the codes -127 to 127, as for weights.

    Where all values are zero, or too small for a normal float32 scale, the codes are zeros and the scale is 1.
    """
    x = x.to(torch.float32)
    # qmax is a tensor of the device: GPUs divide by a number of the host by multiplying with its rounded reciprocal
    scale = x.abs().amax(axes, keepdim=True) / x.new_full((), scheme.qmax)
    scale = torch.where(scale < _SMALLEST, 1.0, scale)
    return scheme.nearest_(x / scale), scale


@cache
def sums_in_int32() -> bool:
    """Returns whether this CPU has VNNI and so sums products of int8 numbers in int32. Without VNNI it sums pairs of
    products in int16, which saturates."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def integer_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the exact product, int32 (..., out), of codes `q` (..., in) and an int8 `weight` (out, in). The codes are
    int8 or whole numbers in float32."""
    # with one input channel, torch 2.13 mistakes a transposed weight for one that is not transposed
    if q.device.type == "cpu" and q.numel() and weight.shape[1] > 1 and sums_in_int32():
        rows = q.reshape(-1, q.shape[-1]).to(torch.int8)
        return torch._int_mm(rows, weight.t()).view(*q.shape[:-1], -1)
    return _in_float(q, weight)


def _in_float(q: Tensor, weight: Tensor) -> Tensor:
    """Returns the exact product, int32 (..., out), of codes `q` (..., in) and an int8 `weight` (out, in), added up from
    float32 sums of at most 1024 products (_PIECE), which are exact."""
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
    """Returns the exact convolution, int32 (batch, out, height, width), of padded codes `q` (batch, in, height, width)
    with an int8 `weight` (out, in / groups, height, width). The codes are whole numbers in float32. `stride`,
    `dilation` and `groups` are those of the convolution."""
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
