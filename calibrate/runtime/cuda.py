"""The CUDA backend: Octavo's Triton kernels for linear layers; without Triton, and for convolutions, cuBLAS multiplies
the integers and the rest is plain torch, which torch.compile makes one kernel."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .int8_layer import Conv2dState, LinearState
from .int8_matmul import convolution, int_matmul
from .reference import activated

# a torch without CUDA never runs the kernels; importing Triton takes a few tenths of a second
if torch.backends.cuda.is_built() and find_spec("triton") is not None:
    from . import triton_kernels
else:
    triton_kernels = None  # type: ignore[assignment]


@torch.compiler.assume_constant_result
@cache
def _has_integer_cores(device: torch.device) -> bool:
    """Returns whether this GPU multiplies int8 matrices and bfloat16 ones in hardware: those since 2020 do."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`; with `gelu`, "none" or "tanh" as in torch, GELU of the output."""
    if triton_kernels and x.is_cuda and triton_kernels.supports(layer, x) and _has_integer_cores(x.device):
        return triton_kernels.linear(layer, x, gelu)
    return activated(layer.computed(x, int_matmul), gelu)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of `layer` for `x`."""
    return layer.computed(x, convolution(layer, int_matmul))
