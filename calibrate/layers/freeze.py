"""Freezes a layer: computes the numbers of an 8-bit layer, such as deq and quant_bias (class Numbers), from its
quantized weight, its float bias and the way in which its input becomes codes.

Calibration measures the accuracy with these numbers, and export writes them. For output channel n, with the codes x_q
of the input:

    accumulator[n] = sum over k of x_q[k] * weight[n, k]

static, and static for each noise level (TimestepInput):

    y[n]          = (accumulator[n] + quant_bias[n]) * deq[n]
    deq[n]        = input scale * weight scale[n], rounded to the upper 19 bits of a float32, all that Ascend reads
    quant_bias[n] = round(bias[n] / deq[n] - input zero_point * sum over k of weight[n, k])

dynamic, one scale for each token:

    y[n]          = accumulator[n] * (max |x| / 127) * weight scale[n] + bias[n]

A channel whose weights are almost zero but whose bias is not would need a quant_bias beyond int32. Its weight scale is
raised until |bias / deq| is 2**30 (`_holding_bias`).

With FP8 codes there is no quant_bias; a static layer computes

    y[n]          = accumulator[n] * (input scale * weight scale[n]) + bias[n]
"""

from dataclasses import replace

import torch
from torch import Tensor

from octavo.capture.tensors import dtype_name

from .inputs import Input
from .numbers import Numbers
from .scheme import in_float32
from .transforms import Transform
from .weights import QuantizedWeight, encoded, spread

_LIMIT = 2**31  # bound on the absolute value of the accumulator, which is int32
_LARGEST_BIAS = 2.0**30  # largest |bias / deq|: half of int32, which leaves the other half to the sum of products
_MOST_BINS_DIFFER = 16.0  # largest ratio of input scales of timestep bins at which a weight scale is raised
_DEQ_BITS = 0xFFFFE000  # mask of the upper 19 bits of a float32, which the device's dequantizer reads
_SMALLEST = 2.0**-126  # the smallest normal float32
_MANTISSA = 24  # bits of a float32 significand
_AT_ONCE = 64  # rows of a weight summed together: an int64 sum of int8 copies its input, eight times as large
_MAX_ROUNDING = 2.0**-8  # largest relative error of a weight scale in the model's dtype; bfloat16 needs 2**-9


def numbers_of(
    quantized: QuantizedWeight,
    bias: Tensor | None,
    input: Input,
    dtype: torch.dtype,
    transform: Transform | None = None,
    correction: Tensor | None = None,
) -> Numbers | str:
    """Returns the `Numbers` (codes, scales, deq, quant_bias and so on) of an integer layer with the weight `quantized`,
    or a text with the reason why the layer has to stay float, such as an accumulator that could overflow int32.

    `bias` and `dtype` are those of the float layer, and `correction` (out,) is the bias correction. If the ranges of
    the input are known beforehand (static or by noise level) and codes are integers, the correction becomes part of
    quant_bias, and the `bias` of the result is that of the float layer. Otherwise the `bias` of the result is the float
    bias plus the correction, or the correction alone if `bias` is None. With a `transform` of the input, `quantized` is
    the weight for the transformed input."""
    device = quantized.weight.device
    bias = None if bias is None else bias.detach()
    if transform is not None:
        transform = transform.to(device, dtype)
        if fault := transform.fault():
            return f"{dtype_name(dtype)} {fault}"
    offset = torch.zeros(len(quantized.scale), dtype=torch.float64, device=device)
    for part in (bias, correction):
        offset = offset if part is None else offset + part.to(device, torch.float64)
    input = input.of({name: tensor.to(device) for name, tensor in input.tensors.items()}, input.scheme)
    if not input.integer_bias:
        biases = offset.to(dtype if bias is None else bias.dtype) if correction is not None else bias
        numbers = _with_float_bias(quantized, biases, input, dtype, transform)
        return numbers if isinstance(numbers, str) else replace(numbers, made_bias=bias is None and biases is not None)
    quantized = _holding_bias(quantized, offset, input)
    output = _deq_and_quant_bias(quantized, offset, input)
    if isinstance(output, str):
        return output
    return Numbers(quantized.weight, quantized.scale, bias, input, dtype, transform, *output)


def _with_float_bias(
    quantized: QuantizedWeight, bias: Tensor | None, input: Input, dtype: torch.dtype, transform: Transform | None
) -> Numbers | str:
    """Returns the `Numbers` (codes, scales, bias) of a layer without quant_bias: with an input without ranges known
    beforehand (dynamic or float), or with FP8 codes. Returns a text with the reason why the layer has to stay float,
    such as a scale that `dtype` cannot hold. `quantized` has the codes of the weight, after `transform`. `bias`
    includes the bias correction. The scale of an integer weight is rounded to `dtype`, the dtype of the float layer,
    because an Ascend device multiplies by it in this dtype.
    """
    scale = quantized.scale
    if input.scheme.element.integer:
        scale = scale.to(dtype).to(torch.float32)
        if not bool(((scale - quantized.scale).abs() <= _MAX_ROUNDING * quantized.scale).all()):
            return f"{dtype_name(dtype)} cannot hold the scale of a channel's weights"
        largest = input.weights.qmax**2  # dynamic codes are as narrow as those of weights
        if input.rounded and not largest * quantized.weight[0].numel() < _LIMIT:
            return "its accumulator could overflow int32"
    if bias is not None and not bool(bias.isfinite().all()):
        return f"{dtype_name(bias.dtype)} cannot hold its corrected bias"
    if input.scheme.block is not None:
        scale = encoded(scale)
    return Numbers(quantized.weight, scale, bias, input, dtype, transform)


def _holding_bias(quantized: QuantizedWeight, offset: Tensor, input: Input) -> QuantizedWeight:
    """Returns `quantized`, the codes and scales of a weight, with larger scales and codes rounded anew for the output
    channels whose |bias / deq| would be more than 2**30. `offset` (out,) is the bias plus the bias correction.

    An input is at most 255 times its scale, and the rounding error of a weight at most half of the raised weight scale.
    So the product of an input and a weight changes by at most 2**-23 of the channel's bias. Timestep bins have
    different input scales; then this bound is larger by the ratio of the largest to the smallest input scale. If this
    ratio is more than 16, or if all channels share one weight scale, returns `quantized` unchanged.
    """
    finest, coarsest = (end.to(torch.float64) for end in input.tensors["input_scale"].aminmax())
    needed = (offset.abs() / (finest * _LARGEST_BIAS)).to(torch.float32)
    wide = needed > quantized.scale
    if input.scheme.per_tensor or coarsest > _MOST_BINS_DIFFER * finest or not bool(wide.any()):
        return quantized
    weight, scale = quantized.weight.clone(), torch.where(wide, needed, quantized.scale)
    ratios = spread(quantized.scale[wide] / scale[wide], weight)
    weight[wide] = (in_float32(weight[wide]) * ratios).round().to(weight.dtype)
    return QuantizedWeight(weight, scale)


def _deq_and_quant_bias(quantized: QuantizedWeight, offset: Tensor, input: Input) -> tuple[Tensor, Tensor] | str:
    """Returns the tensors deq and quant_bias of a layer; or a text with the reason why the layer has to stay float.
    Each tensor is (out,), or (bins, out) for a TimestepInput. `quantized` has the weight's codes and scales. `input` is
    a StaticInput or TimestepInput, because the ranges must be known beforehand. `offset` (out,) is the float bias plus
    the bias correction, which the layer adds to its output."""
    input_scale, zero_point = input.tensors["input_scale"], input.tensors["input_zero_point"]
    deq = rounded_deq(input_scale.unsqueeze(-1) * quantized.scale)
    if not bool(((deq >= _SMALLEST) & deq.isfinite()).all()):
        return "the product of its input scale and weight scale is outside float32"
    rows = quantized.weight.flatten(1)
    sums = torch.cat([batch.sum(1, dtype=torch.int64) for batch in rows.split(_AT_ONCE)])
    from_zero_point = zero_point.to(torch.int64).unsqueeze(-1) * sums
    deq = torch.where((rows == 0).all(1), _deq_without_weights(offset), deq)
    quant_bias = (offset / deq.to(torch.float64) - from_zero_point.to(torch.float64)).round()
    widest = float(quant_bias.abs().max()) - input.scheme.qmin * input.weights.qmax * rows.shape[1]
    if not widest < _LIMIT:
        return "its accumulator could overflow int32"
    return deq, quant_bias.to(torch.int32)


def rounded_deq(deq: Tensor) -> Tensor:
    """Returns each number of `deq` (input scale times weight scale), rounded to the nearest float32 number whose lower
    13 bits are zero, because an Ascend device ignores these bits."""
    bits = deq.to(torch.float32).view(torch.int32).to(torch.int64)
    return ((bits + 0x1000) & _DEQ_BITS).to(torch.int32).view(torch.float32)


def _deq_without_weights(bias: Tensor) -> Tensor:
    """Returns the deq (out,) of output channels whose weights are all zero; the caller ignores the numbers of all other
    channels. The sum of products of such a channel is always 0, so its output is quant_bias * deq. This output has to
    be exactly the channel's `bias` (out,), rounded to float32. Therefore deq is a power of two by which the rounded
    bias can be divided without a remainder."""
    exponent = torch.frexp(bias).exponent - _MANTISSA  # a float32 bias is 2**exponent times a whole number below 2**24
    powers = torch.ldexp(torch.ones_like(bias), exponent.clamp(-126, 100))
    return torch.where(bias == 0, torch.ones_like(bias), powers).to(torch.float32)


def packed(deq: Tensor) -> Tensor:
    """Returns int64 numbers with the bits of the float32 `deq` in the low 32 bits and zeros in the high 32 bits, the
    form in which the matmul of an Ascend device reads deq."""
    return deq.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def unpacked(deq_scale: Tensor) -> Tensor:
    """Returns the float32 numbers whose bits are in the low half of the int64 `deq_scale`."""
    return deq_scale.to(torch.int32).view(torch.float32)
