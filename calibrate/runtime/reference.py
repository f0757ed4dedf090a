"""The reference backend: computes integer layers on any device, with exact integer sums, slowly. The other backends are
compared with it."""

import torch.nn.functional as F
from torch import Tensor

from ..layers.modules import QuantizedConv2d, QuantizedLinear
from .int8_layer import Conv2dState, LinearState


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). With `gelu`, the name of an approximation of
    torch's GELU ("none" or "tanh"), returns GELU of the output."""
    return activated(QuantizedLinear.forward(layer, x), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    return QuantizedConv2d.forward(layer, x)


def activated(y: Tensor, gelu: str | None) -> Tensor:
    """Returns GELU of `y`, where `gelu` is the name of torch's approximation, "none" or "tanh". Returns `y` itself if
    `gelu` is None."""
    return y if gelu is None else F.gelu(y, approximate=gelu)
