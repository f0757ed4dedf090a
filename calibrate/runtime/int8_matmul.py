"""Computes integer layers by plain int8 matrix products: on CUDA without the Triton kernels, and on an NPU for float32
inputs and convolutions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.modules import QuantizedConv2d

# multiplies codes, whole numbers in float32 (..., in), with an int8 weight (out, in); returns int32 (..., out)
Matmul = Callable[[Tensor, Tensor], Tensor]


def convolution(layer: QuantizedConv2d, matmul: Matmul) -> Callable[[Tensor], Tensor]:
    """Returns a function that convolves codes with the weight of `layer` and returns the sums. The function's argument
    has the codes of a padded input as whole float32 numbers, (batch, in, height, width) or (in, height, width). The
    function cuts the codes into patches (im2col) and multiplies the patches by the weight with `matmul`."""

    def convolve(padded: Tensor) -> Tensor:
        images = padded if padded.ndim == 4 else padded.unsqueeze(0)
        size = layer.geometry.size(images.shape[2:], layer.kernel_size)
        patches = F.unfold(images, layer.kernel_size, layer.dilation, 0, layer.stride)  # (batch, in * patch, places)
        parts = zip(patches.chunk(layer.groups, 1), layer.weight.flatten(1).chunk(layer.groups), strict=True)
        sums = [matmul(group.transpose(1, 2), weight).transpose(1, 2) for group, weight in parts]
        total = torch.cat(sums, 1).unflatten(2, size)
        return total if padded.ndim == 4 else total[0]

    return convolve


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Multiplies `q` (..., in), codes as whole numbers of any dtype, with the int8 `weight` (out, in) by torch._int_mm;
    returns int32 (..., out). Pads both matrices with zeros, because torch._int_mm on CUDA needs more than 16 rows of
    `q`, and multiples of 8 for `in` and `out`."""
    rows = q.reshape(-1, q.shape[-1]).to(torch.int8)
    outs, ins = weight.shape
    more_rows, more_ins, more_outs = max(0, 17 - len(rows)), -ins % 8, -outs % 8
    # cuBLAS needs the second matrix in column-major order, so the transposed weight is passed as it lies in memory
    total = torch._int_mm(F.pad(rows, (0, more_ins, 0, more_rows)), F.pad(weight, (0, more_ins, 0, more_outs)).t())
    return total[: len(rows), :outs].reshape(*q.shape[:-1], outs)
