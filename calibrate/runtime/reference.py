"""The reference backend: computes integer layers on any device, with exact integer sums, slowly. The other backends are
compared with it."""

import torch.nn.functional as F
from torch import Tensor

from ..layers.modules import QuantizedConv2d, QuantizedLinear
from .int8_layer import Conv2dState, LinearState


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). If `gelu` is not None, returns GELU of the
    output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    return activated(QuantizedLinear.forward(layer, x), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    return QuantizedConv2d.forward(layer, x)


def activated(y: Tensor, gelu: str | None) -> Tensor:
    """Returns GELU of `y`, with `gelu` ("none" or "tanh") as the argument `approximate` of F.gelu. Returns `y` itself
    if `gelu` is None."""
    return y if gelu is None else F.gelu(y, approximate=gelu)
