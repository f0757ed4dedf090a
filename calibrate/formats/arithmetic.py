"""Computes a checkpoint's layers as the device does, in whole numbers, and compares the result with floating point."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.paging import page_out

from ..layers.modules import QuantizedLayer, QuantizedLinear
from ..layers.products import dynamic_codes

_ROWS = 4  # rows of seeded input that each layer is computed on
_DEQ_ERROR = 2.0**-11  # largest relative rounding of deq_scale: the device reads 10 bits of its mantissa
_FLOAT_ERROR = 2.0**-22  # relative error of a few float32 operations, of 2**-24 each
_HALF = 0.51  # largest rounding of quant_bias, in steps of the accumulator: half, and 2 % for float arithmetic


class Shares(NamedTuple):
    """The distance of the integers from floating point, in shares of what rounding explains: up to 1.0 is sound.

    `scales`: of deq from the product of the scales, or of a W8A8_DYNAMIC output from float64. `bias`: of quant_bias
    from the bias. 0.0 where a layer has no such numbers.
    """

    scales: float
    bias: float


def shares(layer: QuantizedLayer) -> Shares:
    """Compares the output of the integers with that of the dequantized weights and inputs.

    npu_quantize gives codes q of int8, npu_quant_matmul (sum_k q[k] * weight[n, k] + quant_bias[n]) * deq[n]; here on
    seeded codes, in int64 and float64, for each bin of noise levels. A convolution is computed at one position.
    """
    if layer.weight_only:
        return Shares(0.0, 0.0)
    if not layer.calibrated:
        return Shares(_dynamic_share(layer), 0.0)
    weight = layer.weight.detach().flatten(1).to("cpu", torch.int64)  # (out, in)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (_ROWS, weight.shape[1]), generator=generator)
    total, sums = codes @ weight.T, weight.sum(1)  # (rows, out), (out,)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
    scale = layer.weight_scale.cpu().double()
    worst = Shares(0.0, 0.0)
    for input_scale, zero_point, deq, quant_bias in _bins(layer):
        made = (total + quant_bias.to(torch.int64)).double() * deq
        exact = (total - zero_point.to(torch.int64) * sums).double() * deq + bias.double()
        product = input_scale.double() * scale
        scales = ((deq - product).abs() / (1.01 * _DEQ_ERROR * product))[weight.any(1)]  # others scale a bias alone
        biases = (made - exact).abs() / (_HALF * deq)
        worst = Shares(max(worst.scales, _largest(scales)), max(worst.bias, _largest(biases)))
    return worst


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _bins(layer: QuantizedLayer) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Input scale, zero point, deq in float64 and quant_bias of each bin of noise levels; a static layer has one."""
    outputs = layer.weight.shape[0]
    tensors = (
        layer.input_scale.view(-1), layer.input_zero_point.view(-1),
        layer.deq.double().view(-1, outputs), layer.quant_bias.view(-1, outputs),
    )  # fmt: skip
    return list(zip(*(tensor.cpu() for tensor in tensors), strict=True))


def corrected(layer: QuantizedLayer) -> bool:
    """Whether quant_bias carries more than the layer's own bias."""
    return bool(layer.calibrated) and _residue(layer) > _HALF


def correction_share(layer: QuantizedLayer) -> float:
    """The largest correction that quant_bias carries, as a share of the largest sum that such a layer can have."""
    return _residue(layer) / (255 * 127 * layer.weight[0].numel())


def _residue(layer: QuantizedLayer) -> float:
    """The largest difference of quant_bias from the quant_bias of the layer's own bias, in steps of the accumulator."""
    sums = layer.weight.detach().flatten(1).sum(1, dtype=torch.int64).cpu()
    page_out(layer.weight)
    bias = torch.zeros(len(sums)) if layer.bias is None else layer.bias.detach().cpu()
    return max(
        _largest((quant_bias.double() + zero_point.to(torch.int64) * sums - bias.double() / deq).abs())
        for _, zero_point, deq, quant_bias in _bins(layer)
    )


def _dynamic_share(layer: QuantizedLayer) -> float:
    numbers = layer.numbers
    weight = numbers.weight.flatten(1).cpu()
    bias = None if numbers.bias is None else numbers.bias.cpu()
    scale = numbers.weight_scale.cpu()
    linear = QuantizedLinear(replace(numbers, weight=weight, weight_scale=scale, bias=bias, transform=None))
    x = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    q, token = dynamic_codes(x, (-1,))
    exact = (q.to(torch.int64) @ weight.to(torch.int64).T).double() * token.double() * scale.double()
    rounding = _FLOAT_ERROR * exact.abs()
    if bias is not None:
        exact, rounding = exact + bias.double(), rounding + _FLOAT_ERROR * bias.double().abs()
    return _largest((linear(x).double() - exact).abs() / (rounding + 2.0**-126))
