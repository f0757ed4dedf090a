"""CUDA: cuBLAS multiplies the integers; the rest is plain torch, which torch.compile makes one kernel of."""

from typing import TYPE_CHECKING

from torch import Tensor

from .products import convolution, int_matmul
from .reference import activated

if TYPE_CHECKING:
    from .modules import Int8Conv2d, Int8Linear


def linear(layer: "Int8Linear", x: Tensor, gelu: str | None = None) -> Tensor:
    """The output of `layer`; with `gelu`, "none" or "tanh" as in torch, GELU of it."""
    return activated(layer.computed(x, int_matmul), gelu)


def conv2d(layer: "Int8Conv2d", x: Tensor) -> Tensor:
    """The output of `layer`."""
    return layer.computed(x, convolution(layer, int_matmul))
