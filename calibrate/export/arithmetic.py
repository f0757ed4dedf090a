"""Computes a checkpoint's layers as the device does, in whole numbers, and holds the result against floating point."""

import torch

from ..layers import QuantizedLayer

_ROWS = 4
_DEQ_ERROR = 2.0**-11  # relative: the device reads 10 bits after the point of deq_scale


def worst_share(layer: QuantizedLayer) -> float:
    """The largest difference between the integers' output and that of the dequantized weights and inputs, and between
    deq and the product of the scales, as a share of what rounding explains: 1.0 and less is sound. 0.0 for a layer
    whose inputs stay float.

    npu_quantize gives codes q of int8, npu_quant_matmul (sum_k q[k] * weight[n, k] + quant_bias[n]) * deq[n]; here
    on seeded codes, int64 and float64. A convolution is taken at one position of its input.
    """
    if layer.weight_only:
        return 0.0
    weight = layer.weight.detach().flatten(1).to(torch.int64)  # (out, in)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (_ROWS, weight.shape[1]), generator=generator)
    zero_point = layer.input_zero_point.to(torch.int64)
    deq, scale = layer.deq.double().flatten(), layer.weight_scale.double().flatten()
    made = (codes @ weight.T + layer.quant_bias.to(torch.int64)).double() * deq
    exact = ((codes - zero_point) @ weight.T).double() * deq
    if layer.bias is not None:
        exact = exact + layer.bias.detach().double()
    product = layer.input_scale.double() * scale
    scales = (deq - product).abs() / (1.01 * _DEQ_ERROR * product)
    return max(float(((made - exact).abs() / (0.51 * deq)).max()), float(scales.max()))
