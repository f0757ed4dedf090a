"""The CPU backend: oneDNN's kernels multiply the codes of the input by packed int8 weights, and apply scale, bias and
GELU in the same pass.

The codes of inputs are uint8 here, which are the int8 codes plus 128: for int8 inputs with a zero point other than 0
oneDNN is ten times slower.

A packed weight is in oneDNN's own layout, which torch.compile cannot trace, so graphs of torch.compile contain custom
operators instead (`compiled`). A layer with a range for each timestep bin chooses its range by the noise level of the
call. A graph does not know the noise level, so such a layer runs outside of graphs.

The reference backend adds quant_bias to the integer sum, exactly. oneDNN multiplies the sum by the scale, and then adds
a bias that is rounded to float32. Because of this rounding the two backends differ in outputs close to 0 of a layer
with a large bias, by about the rounding error of the bias.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.products import dynamic_codes, sums_in_int32
from ..layers.scheme import QParams, codes, divided
from ..layers.transforms import Multiply
from ..native import kernels
from . import reference
from .choice import by_float32, linear_in_float32
from .int8_layer import Conv2dState, LinearState
from .onednn_weights import SHIFT, Output

_AT_ONCE = 1 << 20  # values quantized at once, so few that they stay in the cache between the steps of the formula
_WHOLE = 1.5 * 2.0**23  # added to a float32, it rounds it to a whole number, which the low bits of the sum hold
_OUT = (torch.float32, torch.bfloat16)  # dtypes in which oneDNN's kernels can write the output


def multiplies_codes() -> bool:
    """Returns whether this processor can compute integer linear layers fast: either it has VNNI, the instructions with
    which oneDNN multiplies 8-bit integers exactly, or Octavo's compiled kernel runs on it. If not, the reference
    backend computes the layers."""
    return sums_in_int32() or kernels.library() is not None


@torch.compiler.disable
def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). If `gelu` is not None, returns GELU of the
    output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    with torch._C.DisableTorchFunction():  # otherwise a mode, such as Attention, would be called in every small step
        return _linear(layer, x, gelu)


def of_codes(layer: LinearState, q: Tensor, dtype: torch.dtype, gelu: str | None) -> Tensor:
    """Returns the output (rows, out) of a static layer, in `dtype`, for an input that is already quantized: `q` (rows,
    in) holds its codes as uint8, that is, the int8 codes plus 128. If `gelu` is not None, returns GELU of the output;
    `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    if not len(q):
        return q.new_empty(0, layer.out_features, dtype=dtype)
    return _product(layer, q, 0, dtype, gelu)


def _linear(layer: LinearState, x: Tensor, gelu: str | None) -> Tensor:
    if not x.numel() or not (layer.weight_only or multiplies_codes()):
        return reference.linear(layer, x, gelu)
    rows = x.reshape(-1, x.shape[-1])
    if layer.weight_only:
        return reference.activated(_weight_only(layer, rows), gelu).view(*x.shape[:-1], -1)
    if not layer.calibrated:
        return _dynamic(layer, rows, gelu).view(*x.shape[:-1], -1)
    bins = layer.bins(len(x) if x.ndim > 1 else None)
    if isinstance(bins, int):
        return _static(layer, x, bins, gelu).view(*x.shape[:-1], -1)
    outputs = [_static(layer, sample, index, gelu) for sample, index in zip(x, bins, strict=True)]
    return torch.stack(outputs).view(*x.shape[:-1], -1)


def _weight_only(layer: LinearState, rows: Tensor) -> Tensor:
    """Returns the output (rows, out) of a weight-only layer for the float input `rows` (rows, in), computed with the
    values that the weight's codes represent, in the dtype of `rows`. Computes these values for only as many output
    channels at a time as fit in the cache."""
    x, y = layer.transformed(rows, -1), torch.empty(len(rows), layer.out_features, dtype=rows.dtype)
    linear = partial(by_float32, F.linear) if linear_in_float32(x.dtype, len(rows)) else F.linear
    for start in range(0, layer.out_features, step := max(1, _AT_ONCE // layer.in_features)):
        channels = slice(start, start + step)
        y[:, channels] = linear(x, *layer._float_weight(x.dtype, channels))
    return y


def _static(layer: LinearState, x: Tensor, index: int, gelu: str | None) -> Tensor:
    return _product(layer, _shared_codes(layer, x, index), index, x.dtype, gelu)


def _shared_codes(layer: LinearState, x: Tensor, index: int) -> Tensor:
    if layer.shared_codes is None:
        return _quantized(layer, x, index)
    return layer.shared_codes.of(x, layer.quantization(index), lambda: _quantized(layer, x, index))


def _quantized(layer: LinearState, x: Tensor, index: int) -> Tensor:
    """Returns the codes of `x` (..., in) as uint8 (rows, in), that is, the int8 codes plus 128. All leading axes of `x`
    become rows. `index` is the index of the timestep bin whose scale and zero point determine the codes, 0 for a layer
    with one range."""
    rows, library = x.reshape(-1, x.shape[-1]), kernels.kernels_for(x)
    q = torch.empty(rows.shape, dtype=torch.uint8)
    scale, zero_point, transform = layer.quantization(index)
    if library is not None and (transform is None or isinstance(transform, Multiply)):
        library.quantize(rows.contiguous(), q, scale, zero_point, transform.factors if transform else None)
        return q
    for out, piece in _pieces(q, rows):
        _quantize(out, layer.transformed(piece, -1), layer.qparams(index))
    return q


def _quantize(out: Tensor, x: Tensor, qparams: QParams) -> None:
    """Writes the codes of the float tensor `x`, plus 128, into `out`, uint8 of the same shape. `qparams` are the scale
    and zero point. Octavo's compiled kernel writes the codes in one pass if it accepts the dtype of `x`, else torch in
    a few.

    torch divides by the scale, adds the zero point, and then adds _WHOLE + SHIFT, where _WHOLE is 1.5 * 2 ** 23 and
    SHIFT is 128. A float32 number as large as _WHOLE has no fraction, so this sum is rounded to a whole number. A tie
    becomes an even code, as in the reference backend, because both constants are even. The zero point is added first,
    since adding all three numbers at once would round only once and could give other codes.
    """
    library = kernels.kernels_for(x)
    if library is not None:
        return library.quantize(x.contiguous(), out, float(qparams.scale), int(qparams.zero_point))
    q = divided(x, qparams.scale).add_(qparams.zero_point).add_(_WHOLE + SHIFT)
    out.copy_(q.clamp_(_WHOLE, _WHOLE + 255).view(torch.int32))


def _dynamic(layer: LinearState, rows: Tensor, gelu: str | None) -> Tensor:
    y = torch.empty(len(rows), layer.out_features, dtype=rows.dtype)
    for out, piece in _pieces(y, rows):
        input_codes, scale = dynamic_codes(layer.transformed(piece, -1), (-1,))
        q = _store(torch.empty(piece.shape, dtype=torch.uint8), input_codes)
        product = _product(layer, q, 0, torch.float32, None).mul_(scale)
        out.copy_(product if layer.bias is None else product.add_(layer.bias))
    return reference.activated(y, gelu)


def _pieces(out: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _AT_ONCE // x.shape[-1])
    return zip(out.split(rows), x.split(rows), strict=True)


def _store(out: Tensor, input_codes: Tensor) -> Tensor:
    """Writes `input_codes`, int8 codes as whole float32 numbers, plus 128 into the uint8 tensor `out` of the same
    shape. Returns `out`, and overwrites `input_codes`.

    Adds 128 (SHIFT) and 1.5 * 2 ** 23 (_WHOLE) to each number: at this size the low eight bits of a float32 number are
    the uint8 code. Then reads the float32 numbers as int32, because the CPU converts 16 int32 numbers to uint8 at a
    time, but only one float32 number.
    """
    return out.copy_(input_codes.add_(_WHOLE + SHIFT).view(torch.int32))


def _product(layer: LinearState, q: Tensor, index: int, dtype: torch.dtype, gelu: str | None) -> Tensor:
    """Returns the output of the layer, in `dtype`, for the input codes `q`, uint8 (rows, in), in the timestep bin
    `index`. For a dynamic layer, the output still has to be multiplied by the scale of each row, and the bias added. If
    `gelu` is not None, returns GELU of the output; `gelu` is then the argument `approximate` of F.gelu, "none" or
    "tanh"."""
    if not sums_in_int32():
        library = kernels.library()
        assert library is not None
        return layer.product(library, index)(q, dtype if dtype in kernels.TYPES else torch.float32, gelu).to(dtype)
    packed, output = layer.packed, layer.packed.outputs[index]
    post: tuple[str, list, str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    weight = packed.weight, output.scale, packed.zero_points, output.bias
    out = dtype if dtype in _OUT else torch.float32
    y = torch.ops.onednn.qlinear_pointwise(q, 1.0, output.zero_point, *weight, 1.0, 0, out, *post)
    return y.to(dtype)


@torch.compiler.disable
def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    if layer.weight_only or not sums_in_int32() or not x.numel():
        return reference.conv2d(layer, x)
    images = x if x.ndim == 4 else x.unsqueeze(0)
    bins = layer.bins(len(x) if x.ndim == 4 else None) if layer.calibrated else 0
    if isinstance(bins, int):
        y = _images(layer, images, bins)
    else:
        y = torch.cat([_images(layer, image, index) for image, index in zip(images.split(1), bins, strict=True)])
    return y if x.ndim == 4 else y[0]


def _images(layer: Conv2dState, x: Tensor, index: int) -> Tensor:
    output, multiplied = layer.packed.outputs[index], layer.transformed(x, -3)
    if layer.calibrated:
        qparams = layer.qparams(index)
        return _convolved(
            layer, codes(multiplied, qparams, layer.input_scheme), float(qparams.zero_point), output, x.dtype
        )
    input_codes, scale = dynamic_codes(multiplied, (-3, -2, -1))
    y = _convolved(layer, input_codes, 0.0, output, torch.float32).mul_(scale)
    return (y if layer.bias is None else y.add_(layer.bias.view(-1, 1, 1))).to(x.dtype)


def _convolved(
    layer: Conv2dState, input_codes: Tensor, zero_point: float, output: Output, dtype: torch.dtype
) -> Tensor:
    padded = layer.geometry.padded(input_codes, zero_point)
    q = _store(torch.empty(padded.shape, dtype=torch.uint8), padded)
    weight = layer.packed.weight, output.scale, layer.packed.zero_points, output.bias
    moves = layer.stride, (0, 0), layer.dilation, layer.groups
    out = dtype if dtype in _OUT else torch.float32
    y = torch.ops.onednn.qconv_pointwise(q, 1.0, output.zero_point, *weight, *moves, 1.0, 0, out, "none", [], "")
    return y.to(dtype).contiguous()
