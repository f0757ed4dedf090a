"""The CUDA backend. Octavo's Triton kernels compute linear layers. Without Triton, for inputs and GPUs that the kernels
do not support, and for convolutions, cuBLAS multiplies the integers and plain torch computes the rest."""

from importlib.util import find_spec

import torch
from torch import Tensor

from .int8_layer import Conv2dState, LinearState
from .int8_matmul import convolution, int_matmul
from .reference import activated

# a torch without CUDA has no use for the kernels, and importing Triton takes some tenths of a second
if torch.backends.cuda.is_built() and find_spec("triton") is not None:
    from . import triton_kernels
else:
    triton_kernels = None  # type: ignore[assignment]


@torch.compiler.assume_constant_result
def _runs_kernels(device: torch.device) -> bool:
    """Returns whether `device` is an NVIDIA GPU of the Ampere generation or a later one, which Octavo's Triton kernels
    need. Does not check that Triton is installed."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). If `gelu` is not None, returns GELU of the
    output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    if triton_kernels is not None and _runs_kernels(x.device) and triton_kernels.supports(layer, x):
        return triton_kernels.linear(layer, x, gelu)
    return activated(layer.computed(x, int_matmul), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    return layer.computed(x, convolution(layer, int_matmul))
