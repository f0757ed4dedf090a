"""The reference backend: computes integer layers exactly, on any device, slowly."""

import torch.nn.functional as F
from torch import Tensor

from ..layers.modules import QuantizedConv2d, QuantizedLinear
from .int8_layer import Conv2dState, LinearState


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`. `gelu`: None, or "none" or "tanh", the name of torch's approximation; GELU
    of the output is then returned."""
    return activated(QuantizedLinear.forward(layer, x), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of `layer` for `x`."""
    return QuantizedConv2d.forward(layer, x)


def activated(y: Tensor, gelu: str | None) -> Tensor:
    """Returns GELU of `y` with torch's approximation `gelu`, "none" or "tanh"; `y` itself for None."""
    return y if gelu is None else F.gelu(y, approximate=gelu)
