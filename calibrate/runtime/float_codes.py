"""Computes layers with FP8 codes on every device. Linear layers multiply codes in float32, and so differ from the
reference backend, whose sums are exact on a CPU, by at most the rounding of float32. Convolutions are the reference's.
"""

import torch.nn.functional as F
from torch import Tensor

from ..layers.modules import QuantizedConv2d
from ..layers.scheme import in_float32
from .int8_layer import Conv2dState, LinearState
from .reference import activated


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). If `gelu` is not None, returns GELU of the
    output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    return activated(layer.computed(x, _product), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    return QuantizedConv2d.forward(layer, x)


def _product(q: Tensor, weight: Tensor) -> Tensor:
    return F.linear(q, in_float32(weight))
