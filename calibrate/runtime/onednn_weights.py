"""The numbers of a layer as oneDNN takes them on the CPU, derived from the checkpoint's, which can be restored.

oneDNN computes in float32

    y[n] = (accumulator[n] - zero_point * sum over k of weight[n, k]) * scale[n] + bias[n]

so the quant_bias of the reference becomes

    bias[n] = (quant_bias[n] + zero_point * sum over k of weight[n, k]) * deq[n]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.modules import QuantizedConv2d, QuantizedLayer
from ..layers.products import integer_matmul
from .onednn_layout import Layouts

SHIFT = 128  # added to int8 codes, which are uint8 here


class Output(NamedTuple):
    """The numbers behind an output in one bin: `zero_point`, a uint8 code; `scale` and `bias`, float32 (out,)."""

    zero_point: int
    scale: Tensor
    bias: Tensor | None


class Packed(NamedTuple):
    """A weight in oneDNN's layout, its zero points, which are zeros, and an Output for each bin of noise levels."""

    weight: Tensor
    zero_points: Tensor
    outputs: tuple[Output, ...]

    def plain(self) -> Tensor:
        """The int8 weight in its own layout."""
        dense = self.weight.to_dense()
        return (dense.t() if dense.ndim == 2 else dense).contiguous()


def pack(layer: QuantizedLayer, layouts: Layouts) -> Packed:
    """Packs the numbers of a layer whose input becomes integers; a layer without bins has one Output.

    The Output of a dynamic layer has the weight scale alone: the scale of the token and the bias are applied later.
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
