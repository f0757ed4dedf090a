"""Freezing: a float layer and what is known of its input become the integers that are evaluated and exported.

accumulator[n] = sum over k of x_q[k] * weight[n, k]

static, and static for each noise level (Timestep):
    y[n]          = (accumulator[n] + quant_bias[n]) * deq[n]
    deq[n]        = input scale * weight scale[n], of which a dequantizer reads the upper 19 bits of the float32
    quant_bias[n] = round(bias[n] / deq[n] - input zero_point * sum over k of weight[n, k])
dynamic, one scale for each token:
    y[n]          = accumulator[n] * (max |x| / 127) * weight scale[n] + bias[n]
"""

from dataclasses import replace

import torch
from torch import Tensor

from .inputs import Activation, Dynamic, InputSpec, Static, Timestep, TimestepQParams
from .numbers import Numbers
from .scheme import QParams
from .weights import QuantizedWeight

_LIMIT = 2**31
_KEPT_BITS = 0xFFFFE000
_SMALLEST = 2.0**-126
_MANTISSA = 24
_AT_ONCE = 64  # rows: a sum of int8 in int64 first makes all of them eight times as large
_GAIN = 2.0**-8  # the largest error of a weight scale in the model's dtype; bfloat16 rounds by 2**-9 at most


def numbers_of(
    quantized: QuantizedWeight,
    bias: Tensor | None,
    spec: InputSpec | None,
    dtype: torch.dtype,
    mul_scale: Tensor | None = None,
    correction: Tensor | None = None,
) -> Numbers | str:
    """The numbers of a layer with this integer weight, or the reason why it has to stay float.

    `correction` (out,) is added to what the layer puts out: inside quant_bias where there is one, while the bias stays
    the model's own; else inside the bias, which is made if there is none. With `mul_scale` (in,), finite and above 0,
    `quantized` is the weight divided by it.
    """
    device = quantized.weight.device
    bias = None if bias is None else bias.detach()
    if mul_scale is not None:
        mul_scale = mul_scale.detach().to(device, dtype)
        if not bool(((mul_scale > 0) & mul_scale.isfinite()).all()):
            return f"{_word(dtype)} does not hold the multiplier of its input"
    wanted = torch.zeros(len(quantized.scale), dtype=torch.float64, device=device)
    for part in (bias, correction):
        wanted = wanted if part is None else wanted + part.to(device, torch.float64)
    if spec is None or isinstance(spec, Dynamic):
        moved = wanted.to(dtype if bias is None else bias.dtype) if correction is not None else bias
        made = _without_ranges(quantized, moved, spec, dtype, mul_scale)
        return made if isinstance(made, str) else replace(made, made_bias=bias is None and moved is not None)
    if isinstance(spec, TimestepQParams):
        each = _integers(quantized, wanted, _on(spec.qparams, device))
        edges = spec.edges.to(device, torch.float32)
        activation: Activation | str = each if isinstance(each, str) else Timestep(*each, edges)
    else:
        each = _integers(quantized, wanted, _on(spec, device))
        activation = each if isinstance(each, str) else Static(*each)
    if isinstance(activation, str):
        return activation
    return Numbers(quantized.weight, quantized.scale, bias, activation, dtype, mul_scale)


def _without_ranges(
    quantized: QuantizedWeight,
    bias: Tensor | None,
    activation: Dynamic | None,
    dtype: torch.dtype,
    mul_scale: Tensor | None,
) -> Numbers | str:
    """Numbers of a layer that multiplies with the weight scale itself, which the device takes in the model's dtype."""
    scale = quantized.scale.to(dtype).to(torch.float32)
    if not bool(((scale - quantized.scale).abs() <= _GAIN * quantized.scale).all()):
        return f"{_word(dtype)} holds no scale for a channel's weights"
    if bias is not None and not bool(bias.isfinite().all()):
        return f"{_word(bias.dtype)} does not hold its corrected bias"
    if activation is not None and not 127 * 127 * quantized.weight[0].numel() < _LIMIT:
        return "its accumulator could leave int32"
    return Numbers(quantized.weight, scale, bias, activation, dtype, mul_scale)


def _integers(quantized: QuantizedWeight, wanted: Tensor, qparams: QParams) -> tuple[QParams, Tensor, Tensor] | str:
    """`qparams`, deq and quant_bias, of shape (out,) or (bins, out), for an output moved by `wanted`."""
    deq = rounded_deq(qparams.scale.unsqueeze(-1) * quantized.scale)
    if not bool(((deq >= _SMALLEST) & deq.isfinite()).all()):
        return "input scale times weight scale is outside float32"
    rows = quantized.weight.flatten(1)
    sums = torch.cat([some.sum(1, dtype=torch.int64) for some in rows.split(_AT_ONCE)])
    offset = qparams.zero_point.to(torch.int64).unsqueeze(-1) * sums
    deq = torch.where((rows == 0).all(1), _dividing(wanted), deq)
    quant_bias = (wanted / deq.to(torch.float64) - offset.to(torch.float64)).round()
    widest = float(quant_bias.abs().max()) + 128 * 127 * rows.shape[1]
    if not widest < _LIMIT:
        return "its accumulator could leave int32"
    return qparams, deq, quant_bias.to(torch.int32)


def _on(qparams: QParams, device: torch.device) -> QParams:
    return QParams(qparams.scale.to(device), qparams.zero_point.to(device))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_deq(deq: Tensor) -> Tensor:
    """float32 numbers rounded to the nearest ones whose lower 13 bits are zero."""
    bits = deq.to(torch.float32).view(torch.int32).to(torch.int64)
    return ((bits + 0x1000) & _KEPT_BITS).to(torch.int32).view(torch.float32)


def _dividing(bias: Tensor) -> Tensor:
    """For channels without weights: powers of two of which the bias is a whole multiple, so that y is the bias exactly.

    Such a channel's deq scales nothing but its bias.
    """
    exponent = torch.frexp(bias).exponent - _MANTISSA  # a float32 bias is a whole number below 2**24 times 2**this
    powers = torch.ldexp(torch.ones_like(bias), exponent.clamp(-126, 100))
    return torch.where(bias == 0, torch.ones_like(bias), powers).to(torch.float32)


def packed(deq: Tensor) -> Tensor:
    """The bits of float32 numbers in the low half of int64, as the device's matmul takes them."""
    return deq.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def unpacked(deq_scale: Tensor) -> Tensor:
    """The float32 numbers of `packed`."""
    return deq_scale.to(torch.int32).view(torch.float32)
