"""The CUDA backend: cuBLAS multiplies the integers; the rest is plain torch, one kernel after torch.compile."""

from torch import Tensor

from .int8_layer import Conv2dState, LinearState
from .int8_matmul import convolution, int_matmul
from .reference import activated


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """The output of `layer`; with `gelu`, "none" or "tanh" as in torch, GELU of the output."""
    return activated(layer.computed(x, int_matmul), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """The output of `layer`."""
    return layer.computed(x, convolution(layer, int_matmul))
