"""Integer layers on a CPU inside graphs of torch.compile.

For a static linear layer, the graph itself computes the codes of the input, so that torch.compile can fuse this
computation with the operations before the layer. A custom operator then computes the output from the codes. For all
other layers a custom operator computes the whole layer. A layer cannot be an argument of an operator, so the operator
gets a tensor that holds the layer's number, and finds the layer in LAYERS.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.scheme import codes
from . import cpu
from .int8_layer import LAYERS, Conv2dState, Int8Layer, LinearState
from .onednn_weights import SHIFT


@torch.compiler.assume_constant_result
def _multiplies_codes() -> bool:
    return cpu.multiplies_codes()


def supports(layer: Int8Layer) -> bool:
    """Returns whether `layer` can run inside a graph of torch.compile. A layer with a range for each timestep bin
    cannot, because it chooses its range by the noise level of the call, which a graph does not know."""
    return not layer.input_type.by_level


def linear(layer: LinearState, x: Tensor, gelu: str | None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in), inside a graph of torch.compile. If `gelu` is
    not None, returns GELU of the output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    shape = *x.shape[:-1], layer.out_features
    if not layer.calibrated or not _multiplies_codes():
        return torch.ops.octavo.layer(x, layer.number, shape, gelu or "")
    input_codes = codes(layer.transformed(x, -1), layer.qparams(0), layer.input_scheme)
    return torch.ops.octavo.product((input_codes + SHIFT).to(torch.uint8), layer.number, shape, x.dtype, gelu or "")


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width), inside a graph of torch.compile."""
    left, right, top, bottom = layer.geometry.padding
    size = layer.geometry.size((x.shape[-2] + top + bottom, x.shape[-1] + left + right), layer.kernel_size)
    return torch.ops.octavo.layer(x, layer.number, [*x.shape[:-3], layer.out_channels, *size], "")


def _whole_layer(x: Tensor, number: Tensor, shape: Sequence[int], gelu: str) -> Tensor:
    layer = LAYERS[int(number)]
    return layer.forward(x, **({"gelu": gelu} if gelu else {})).contiguous()


def _codes_product(q: Tensor, number: Tensor, shape: Sequence[int], dtype: torch.dtype, gelu: str) -> Tensor:
    layer: LinearState = LAYERS[int(number)]  # type: ignore[assignment]
    return cpu.of_codes(layer, q.reshape(-1, q.shape[-1]), dtype, gelu or None).view(shape)


_OPERATORS = torch.library.Library("octavo", "DEF")
_OPERATORS.define("layer(Tensor x, Tensor number, SymInt[] shape, str gelu) -> Tensor")
_OPERATORS.define("product(Tensor q, Tensor number, SymInt[] shape, ScalarType dtype, str gelu) -> Tensor")
_OPERATORS.impl("layer", _whole_layer, "CPU")
_OPERATORS.impl("product", _codes_product, "CPU")
torch.library.register_fake("octavo::layer", lambda x, number, shape, gelu: x.new_empty(shape))
torch.library.register_fake("octavo::product", lambda q, number, shape, dtype, gelu: q.new_empty(shape, dtype=dtype))
