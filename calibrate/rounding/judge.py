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


def error_of(module: FloatLayer, choice: Choice, inputs: JudgedRows) -> float:
    """Returns the relative squared error of the integer layer that `choice` makes of the float layer `module`, on the
    rows `inputs`: the squared error of its output, divided by the sum of squares of the float output. Returns infinity
    if `choice` gives no integer layer.

    A convolution's rows are patches of its input (patches.py).
    """
    rows = row_errors(module, choice, inputs)
    return float("inf") if rows is None else relative_error(*rows)


def relative_error(signal: Tensor, noise: Tensor) -> float:
    """Returns the sum of `noise` divided by that of `signal`, both (rows,); the sum of `noise` if there is no
    signal."""
    total, error = float(signal.sum()), float(noise.sum())
    return error / total if total else error


@torch.no_grad()  # a user's model may require gradients, and the graph would keep all tensors in memory
def row_errors(module: FloatLayer, choice: Choice, inputs: JudgedRows) -> tuple[Tensor, Tensor] | None:
    """Returns, for each row of `inputs`, the sum of squares of the float output and the squared error of the output of
    the layer that `choice` makes of `module`: two float64 tensors (rows,). Returns None if `choice` gives no layer."""
    layer = layer_of(module, choice)
    if isinstance(layer, str):
        return None
    x = inputs.rows
    if isinstance(layer, QuantizedConv2d):
        layer, x = on_patches(layer), x.view(-1, layer.in_channels, *layer.kernel_size)
        exact = F.conv2d(x, module.weight, module.bias, groups=layer.groups).to(torch.float64)
    else:
        exact = F.linear(x, module.weight, module.bias).to(torch.float64)
    layer.noise_level = NoiseLevel.of(inputs.levels)
    noise = (layer(x).to(torch.float64) - exact).square_()
    return exact.square_().flatten(1).sum(1), noise.flatten(1).sum(1)


def on_patches(layer: QuantizedConv2d) -> QuantizedConv2d:
    """Returns a layer with the same weights and scales as `layer` that takes patches (patches, in, kernel height,
    kernel width) and gives one output position for each patch."""
    return QuantizedConv2d(layer.numbers, Geometry((1, 1), (0, 0, 0, 0), (1, 1), "zeros", layer.groups))
