"""The CUDA backend: cuBLAS multiplies the integers. All else is plain torch, which torch.compile makes one kernel."""

from torch import Tensor

from .int8_layer import Conv2dState, LinearState
from .int8_matmul import convolution, int_matmul
from .reference import activated


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`; with `gelu`, "none" or "tanh" as in torch, GELU of the output."""
    return activated(layer.computed(x, int_matmul), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of `layer` for `x`."""
    return layer.computed(x, convolution(layer, int_matmul))
