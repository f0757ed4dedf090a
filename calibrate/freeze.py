"""Freezing: a float layer and the parameters of its input become the integers that are evaluated and exported.

accumulator[n] = sum over k of x_q[k] * weight[n, k]
y[n]           = (accumulator[n] + quant_bias[n]) * deq[n]
deq[n]         = input scale * weight scale[n], of which a dequantizer reads the upper 19 bits of the float32
quant_bias[n]  = round(bias[n] / deq[n] - input zero_point * sum over k of weight[n, k])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import WEIGHT_METHODS, Inputs
from .scheme import QParams
from .weights import QuantizedWeight

_LIMIT = 2**31
_KEPT_BITS = 0xFFFFE000
_SMALLEST = 2.0**-126
_MANTISSA = 24


@dataclass(frozen=True)
class Activation:
    """The integer side of a W8A8 layer's input and output: `qparams` of the input, per tensor; `deq` float32 (out,);
    `quant_bias` int32 (out,)."""

    qparams: QParams
    deq: Tensor
    quant_bias: Tensor


@dataclass(frozen=True)
class Numbers:
    """All numbers of one quantized layer; `activation` is None where only the weight is quantized.

    `weight` int8 (out, in) or (out, in, height, width); `weight_scale` float32 (out,); `bias` as in the float layer.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    activation: Activation | None
    dtype: torch.dtype  # of the float layer


def freeze(
    weight: Tensor,
    bias: Tensor | None,
    qparams: QParams | None,
    method: str,
    inputs: Inputs | None = None,
    iterations: int | None = None,
) -> Numbers | str:
    """The numbers of a layer with this float weight and bias, or the reason why it has to stay float.

    `qparams` are those of its input; None quantizes the weight alone. `method` is a name of WEIGHT_METHODS, for which
    `inputs` and `iterations` are: None is its own number of them.
    """
    options = {} if iterations is None else {"iterations": iterations}
    quantized = WEIGHT_METHODS[method](weight, inputs, **options)
    if quantized is None:
        return "a channel's weights are too small for a float32 scale"
    bias = None if bias is None else bias.detach()
    activation = None
    if qparams is not None:
        made = _activation(quantized, bias, QParams(*(each.to(weight.device) for each in qparams)))
        if isinstance(made, str):
            return made
        activation = made
    return Numbers(quantized.weight, quantized.scale, bias, activation, weight.dtype)


def _activation(quantized: QuantizedWeight, bias: Tensor | None, qparams: QParams) -> Activation | str:
    deq = rounded_deq(qparams.scale * quantized.scale)
    if not bool(((deq >= _SMALLEST) & deq.isfinite()).all()):
        return "input scale times weight scale is outside float32"
    rows = quantized.weight.reshape(len(deq), -1)
    offset = qparams.zero_point.to(torch.int64) * rows.sum(1, dtype=torch.int64)
    wanted = torch.zeros_like(deq, dtype=torch.float64) if bias is None else bias.to(torch.float64)
    empty = (rows == 0).all(1)
    deq = torch.where(empty, _dividing(wanted), deq)
    quant_bias = (wanted / deq.to(torch.float64) - offset.to(torch.float64)).round()
    widest = float(quant_bias.abs().max()) + 128 * 127 * rows.shape[1]
    if not widest < _LIMIT:
        return "its accumulator could leave int32"
    return Activation(qparams, deq, quant_bias.to(torch.int32))


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
