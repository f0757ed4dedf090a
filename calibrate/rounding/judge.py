"""Judges how one layer is to be quantized (a `Choice`) by the error of its integer form on rows of its input."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choice import Choice, layer_of
from ..layers.modules import Geometry, QuantizedConv2d
from ..layers.noise_level import NoiseLevel
from ..plan import FloatLayer


class JudgedRows(Protocol):
    """The rows of a layer's input that choices are judged on: `rows` (rows, in), and `levels`, the noise level of each
    row, (rows,) or None."""

    @property
    def rows(self) -> Tensor: ...

    @property
    def levels(self) -> Tensor | None: ...


@torch.no_grad()  # a user's model may require gradients, and the graph would keep all tensors in memory
def error_of(module: FloatLayer, choice: Choice, inputs: JudgedRows) -> float:
    """Returns the relative squared error of the integer layer that `choice` makes of the float layer `module`, on the
    rows `inputs`: the squared error of its output, divided by the sum of squares of the float output. Returns infinity
    if `choice` gives no integer layer.

    A convolution's rows are patches of its input (patches.py).
    """
    layer = layer_of(module, choice)
    if isinstance(layer, str):
        return float("inf")
    x = inputs.rows
    if isinstance(layer, QuantizedConv2d):
        layer, x = on_patches(layer), x.view(-1, layer.in_channels, *layer.kernel_size)
        exact = F.conv2d(x, module.weight, module.bias, groups=layer.groups).to(torch.float64)
    else:
        exact = F.linear(x, module.weight, module.bias).to(torch.float64)
    layer.noise_level = NoiseLevel.of(inputs.levels)
    signal = float(exact.square().sum())
    noise = float((layer(x).to(torch.float64) - exact).square().sum())
    return noise / signal if signal else noise


def on_patches(layer: QuantizedConv2d) -> QuantizedConv2d:
    """Returns a layer with the same weights and scales as `layer` that takes patches (patches, in, kernel height,
    kernel width) and gives one output position for each patch."""
    return QuantizedConv2d(layer.numbers, Geometry((1, 1), (0, 0, 0, 0), (1, 1), "zeros", layer.groups))
