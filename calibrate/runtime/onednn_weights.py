"""Converts the tensors of an integer layer to oneDNN's form for the CPU; the weight can be converted back.

For output channel n a layer computes y[n] = (accumulator[n] + quant_bias[n]) * deq[n]. Here accumulator is the integer
sum, deq is input scale times weight scale, and quant_bias holds the bias and the effect of the zero point. oneDNN
computes in float32, with k running over the input channels,

    y[n] = (accumulator[n] - zero_point * sum over k of weight[n, k]) * scale[n] + bias[n]

so scale is deq, and the bias for oneDNN leaves out the effect of the zero point:

    bias[n] = (quant_bias[n] + zero_point * sum over k of weight[n, k]) * deq[n]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.modules import QuantizedConv2d, QuantizedLayer
from ..layers.products import integer_matmul
from .onednn_layout import Layouts

SHIFT = 128  # added to int8 codes to make them uint8


class Output(NamedTuple):
    """The numbers with which oneDNN turns a layer's integer sums into its output, in one timestep bin.

    `zero_point`: the zero point of the input plus 128, because oneDNN gets the input's codes as uint8. `scale` and
    `bias`: float32 (out,). The sums, less the effect of the zero point, are multiplied by `scale`; then `bias` is
    added, unless it is None.
    """

    zero_point: int
    scale: Tensor
    bias: Tensor | None


class Packed(NamedTuple):
    """Holds a layer's tensors in oneDNN's form: `weight`, the weight in oneDNN's layout; `zero_points` (out,), the zero
    points of the weight, all 0; and `outputs`, an Output for each timestep bin, or one if there are no bins."""

    weight: Tensor
    zero_points: Tensor
    outputs: tuple[Output, ...]

    def plain(self) -> Tensor:
        """Returns a copy of the int8 weight in torch's layout, in the shape that it had in the layer."""
        dense = self.weight.to_dense()
        return (dense.t() if dense.ndim == 2 else dense).contiguous()


def pack(layer: QuantizedLayer, layouts: Layouts) -> Packed:
    """Returns the tensors of a static or dynamic layer in oneDNN's form. `layouts` packs the weights of linear layers;
    use one Layouts object for all layers of a model. A layer without timestep bins gets one Output.

    The Output of a dynamic layer has no bias, and only the weight's scale: the scale of each token and the bias are
    applied after oneDNN's product.
    """
    weight = layer.weight.detach().contiguous()  # oneDNN ignores strides
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    rows = weight.flatten(1)
    sums = integer_matmul(torch.ones(rows.shape[1]), rows)  # faster than a sum, which copies all to int64 first
    if isinstance(layer, QuantizedConv2d):
        geometry = layer.stride, (0, 0), layer.dilation, layer.groups
        packed = torch.ops.onednn.qconv_prepack(weight, torch.ones(len(weight)), 1.0, 0, *geometry)
    else:
        packed = layouts.pack(weight, sums)
    if not layer.calibrated:
        return Packed(packed, zeros, (Output(SHIFT, layer.weight_scale, None),))
    zero_points, deq = layer.input_zero_point.reshape(-1), layer.deq.view(-1, len(weight))
    shifted = layer.quant_bias.view_as(deq) + zero_points.long().unsqueeze(1) * sums
    biases = (shifted.double() * deq).float()
    outputs = zip((zero_points + SHIFT).tolist(), deq, biases, strict=True)
    return Packed(packed, zeros, tuple(Output(*numbers) for numbers in outputs))
