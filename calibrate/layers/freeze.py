"""Freezes a float layer: its weight, bias and the choice for its input become the integers evaluated and exported.

accumulator[n] = sum over k of x_q[k] * weight[n, k]

static, and static for each noise level (TimestepInput):
    y[n]          = (accumulator[n] + quant_bias[n]) * deq[n]
    deq[n]        = input scale * weight scale[n], of which a dequantizer reads the upper 19 bits of the float32
    quant_bias[n] = round(bias[n] / deq[n] - input zero_point * sum over k of weight[n, k])
dynamic, one scale for each token:
    y[n]          = accumulator[n] * (max |x| / 127) * weight scale[n] + bias[n]
"""

from dataclasses import replace

import torch
from torch import Tensor

from .inputs import Input
from .numbers import Numbers
from .transforms import Transform
from .weights import QuantizedWeight

_LIMIT = 2**31  # the accumulator is int32
_KEPT_BITS = 0xFFFFE000  # the upper 19 bits of a float32, which the device's dequantizer reads
_SMALLEST = 2.0**-126  # the smallest normal float32
_MANTISSA = 24  # bits of a float32 significand
_AT_ONCE = 64  # rows of a weight summed together: an int64 sum of int8 first makes a copy eight times as large
_GAIN = 2.0**-8  # the largest error of a weight scale in the model's dtype; bfloat16 rounds by 2**-9 at most


def numbers_of(
    quantized: QuantizedWeight,
    bias: Tensor | None,
    input: Input,
    dtype: torch.dtype,
    transform: Transform | None = None,
    correction: Tensor | None = None,
) -> Numbers | str:
    """The numbers of a layer with this integer weight, or the reason why it has to stay float.

    `correction` (out,) is added to the layer's output: inside quant_bias where there is one, while the bias stays the
    model's own; else inside the bias, which is made if there is none. With a `transform`, `quantized` is the weight for
    the transformed input.
    """
    device = quantized.weight.device
    bias = None if bias is None else bias.detach()
    if transform is not None:
        transform = transform.to(device, dtype)
        if fault := transform.fault():
            return f"{_word(dtype)} {fault}"
    wanted = torch.zeros(len(quantized.scale), dtype=torch.float64, device=device)
    for part in (bias, correction):
        wanted = wanted if part is None else wanted + part.to(device, torch.float64)
    if not input.ranged:
        moved = wanted.to(dtype if bias is None else bias.dtype) if correction is not None else bias
        numbers = _without_ranges(quantized, moved, input, dtype, transform)
        return numbers if isinstance(numbers, str) else replace(numbers, made_bias=bias is None and moved is not None)
    input = input.of({name: tensor.to(device) for name, tensor in input.tensors.items()}, input.scheme)
    output = _output(quantized, wanted, input)
    if isinstance(output, str):
        return output
    return Numbers(quantized.weight, quantized.scale, bias, input, dtype, transform, *output)


def _without_ranges(
    quantized: QuantizedWeight, bias: Tensor | None, input: Input, dtype: torch.dtype, transform: Transform | None
) -> Numbers | str:
    """Numbers of a layer that multiplies with the weight scale itself, which the device takes in the model's dtype."""
    scale = quantized.scale.to(dtype).to(torch.float32)
    if not bool(((scale - quantized.scale).abs() <= _GAIN * quantized.scale).all()):
        return f"{_word(dtype)} holds no scale for a channel's weights"
    if bias is not None and not bool(bias.isfinite().all()):
        return f"{_word(bias.dtype)} does not hold its corrected bias"
    largest = input.weights.qmax**2  # codes found on the spot are as narrow as those of weights
    if input.rounded and not largest * quantized.weight[0].numel() < _LIMIT:
        return "its accumulator could leave int32"
    return Numbers(quantized.weight, scale, bias, input, dtype, transform)


def _output(quantized: QuantizedWeight, wanted: Tensor, input: Input) -> tuple[Tensor, Tensor] | str:
    """deq and quant_bias, (out,) or (bins, out), for an input with ranges; `wanted` (out,) is added to the output."""
    input_scale, zero_point = input.tensors["input_scale"], input.tensors["input_zero_point"]
    deq = rounded_deq(input_scale.unsqueeze(-1) * quantized.scale)
    if not bool(((deq >= _SMALLEST) & deq.isfinite()).all()):
        return "input scale times weight scale is outside float32"
    rows = quantized.weight.flatten(1)
    sums = torch.cat([some.sum(1, dtype=torch.int64) for some in rows.split(_AT_ONCE)])
    offset = zero_point.to(torch.int64).unsqueeze(-1) * sums
    deq = torch.where((rows == 0).all(1), _dividing(wanted), deq)
    quant_bias = (wanted / deq.to(torch.float64) - offset.to(torch.float64)).round()
    widest = float(quant_bias.abs().max()) - input.scheme.qmin * input.weights.qmax * rows.shape[1]
    if not widest < _LIMIT:
        return "its accumulator could leave int32"
    return deq, quant_bias.to(torch.int32)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_deq(deq: Tensor) -> Tensor:
    """Rounds float32 numbers to the nearest ones whose lower 13 bits are zero."""
    bits = deq.to(torch.float32).view(torch.int32).to(torch.int64)
    return ((bits + 0x1000) & _KEPT_BITS).to(torch.int32).view(torch.float32)


def _dividing(bias: Tensor) -> Tensor:
    """The deq of channels without weights: powers of two that divide the bias, so that y is the bias exactly.

    The deq of such a channel scales nothing but its bias.
    """
    exponent = torch.frexp(bias).exponent - _MANTISSA  # a float32 bias is 2**exponent times a whole number below 2**24
    powers = torch.ldexp(torch.ones_like(bias), exponent.clamp(-126, 100))
    return torch.where(bias == 0, torch.ones_like(bias), powers).to(torch.float32)


def packed(deq: Tensor) -> Tensor:
    """The bits of float32 numbers in the low half of int64, as the device's matmul takes them."""
    return deq.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def unpacked(deq_scale: Tensor) -> Tensor:
    """The float32 numbers that `packed` stored."""
    return deq_scale.to(torch.int32).view(torch.float32)
