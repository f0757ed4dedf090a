"""Integer linear layers on a GPU by two Triton kernels: one makes the codes of the input, one multiplies.

The kernels compute in the same order as `layers.scheme` and the reference backend, so that codes and integer sums are
equal to theirs. The kernels divide by `div_rn`, because Triton's `/` does not round to the nearest number. Graphs of
torch.compile contain the kernels as custom operators.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layers.scheme import STORABLE
from ..layers.transforms import Multiply
from .int8_layer import LinearState

_IN_ORDER = {"enable_fp_fusion": False}  # option of Triton: a product and a sum are two operations, not one

_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added to a small float32, it rounds it to a whole number, ties to even
_SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal float32
_SQRT_HALF = tl.constexpr(0.5**0.5)
_TANH = tl.constexpr(-2 * (2 / torch.pi) ** 0.5)  # (1 + tanh(a)) / 2 in GELU is 1 / (1 + exp(-2 * a))
_TANH_CUBE = tl.constexpr(0.044715)  # factor of y ** 3 in GELU with tanh


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def codes_kernel(x, factors, scale, zero_point, q, rows, ins, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the int8 codes of one row of the float input `x` into the same row of `q`. `x` and `q` are (samples *
    rows, ins), where `rows` is the number of rows of a sample. The index of the row is Triton's program_id(0). BLOCK is
    a power of two, at least `ins`.

    The row is first multiplied by `factors` (ins,), unless `factors` is None. If DYNAMIC, the kernel computes the row's
    scale and writes it into `scale` (samples * rows,), and `zero_point` is None. Otherwise it reads `scale` and
    `zero_point` (samples,), one number for each sample.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ins
    values = tl.load(x + row * ins + column, mask=inside, other=0.0)
    if factors is not None:
        by = tl.load(factors + column, mask=inside, other=0.0).to(values.dtype)
        values = (values.to(tl.float32) * by.to(tl.float32)).to(values.dtype)
    values = values.to(tl.float32)
    if DYNAMIC:
        step = tl.div_rn(tl.max(tl.abs(values), 0), 127.0)
        step = tl.where(step < _SMALLEST, 1.0, step)
        tl.store(scale + row, step)
        shifted = tl.maximum(tl.div_rn(values, step), -127.0)
    else:
        step = tl.load(scale + row // rows)
        shifted = tl.maximum(tl.div_rn(values, step) + tl.load(zero_point + row // rows).to(tl.float32), -128.0)
    whole = (tl.minimum(shifted, 127.0) + _WHOLE) - _WHOLE
    tl.store(q + row * ins + column, whole.to(tl.int8), mask=inside)


@triton.jit
def product_kernel(
    x, weight, scale, bias, row_scale, y, rows, ins, outs,
    KIND: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Writes a tile (ROWS, OUTS) of a layer's output, or GELU of it (see `_activated`), into `y` (samples, rows, outs).
    Reads INS of the `ins` columns of the input `x` (samples, rows, ins) and of the int8 `weight` (outs, ins) at a time.
    `row_scale` has the scales of the rows of `x`.

    | KIND      | x     | scale                      | row_scale         | bias                              |
    |-----------|-------|----------------------------|-------------------|-----------------------------------|
    | "static"  | int8  | deq (samples, outs)        | None              | quant_bias, int32 (samples, outs) |
    | "dynamic" | int8  | the weight's scale (outs,) | (samples * rows,) | the layer's bias (outs,) or None  |
    | "float"   | float | the weight's scale (outs,) | None              | the layer's bias (outs,) or None  |
    """
    sample = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    # rows and outputs beyond the end repeat the last one and are not stored
    x_row = sample * rows + tl.minimum(row, rows - 1)
    channel = tl.minimum(out, outs - 1).to(tl.int64)
    if KIND == "static":
        scale += sample * outs
        bias += sample * outs
    by = tl.load(scale + channel)
    total = _sums(x, weight, by, x_row, channel, ins, KIND == "float", ROWS, OUTS, INS)
    if KIND == "static":
        result = (total + tl.load(bias + channel)[None, :]).to(tl.float32) * by[None, :]
    else:
        if KIND == "dynamic":
            result = total.to(tl.float32) * (tl.load(row_scale + x_row)[:, None] * by[None, :])
        else:
            result = total
        if bias is not None:
            addend = tl.load(bias + channel)
            if KIND == "float":
                addend = addend.to(x.dtype.element_ty)
            result += addend.to(tl.float32)[None, :]
    result = _activated(result.to(y.dtype.element_ty), GELU)
    place = y + (sample * rows + row)[:, None] * outs + out[None, :]
    tl.store(place, result.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (out < outs)[None, :])


@triton.jit
def _sums(
    x, weight, scale, row, channel, ins,
    FLOAT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """Returns the products of some rows of `x` with some rows of `weight`, (ROWS, OUTS): each entry is the sum over all
    columns. `row` (ROWS,) has the indices of the rows of `x`, `channel` (OUTS,) those of the rows of `weight`. INS of
    the `ins` columns are read at a time. With FLOAT, the weight's codes are first multiplied by `scale` (OUTS,) and
    rounded to the dtype of `x`, and the sums are float32. Without FLOAT, the sums are int32."""
    column = tl.arange(0, INS)
    left = x + row[:, None] * ins + column[None, :]
    right = weight + channel[None, :] * ins + column[:, None]
    total = tl.full((ROWS, OUTS), 0, tl.float32 if FLOAT else tl.int32)
    for start in range(0, ins, INS):
        inside = column < ins - start
        a = tl.load(left + start, mask=inside[None, :], other=0)
        b = tl.load(right + start, mask=inside[:, None], other=0)
        if FLOAT:
            b = (b.to(tl.float32) * scale[None, :]).to(a.dtype)
            total = tl.dot(a, b, total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    return total


@triton.jit
def _activated(y, GELU: tl.constexpr):
    """Returns GELU of `y` in float32, where GELU is the argument `approximate` of F.gelu, "none" or "tanh". If GELU is
    "", returns `y` in float32."""
    y = y.to(tl.float32)
    if GELU == "tanh":
        y = y / (tl.exp((y * y * y * _TANH_CUBE + y) * _TANH) + 1)
    elif GELU == "none":
        y = y * 0.5 * (tl.erf(y * _SQRT_HALF) + 1)
    return y


# --- operators --------------------------------------------------------------------------------------------------------


def _codes(x: Tensor, factors: Tensor | None, scale: Tensor, zero_point: Tensor) -> Tensor:
    q = torch.empty_like(x, dtype=torch.int8)
    _launch_codes(x, factors, scale, zero_point, q, len(scale))
    return q


def _token_codes(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty_like(x, dtype=torch.int8), _scale_of(x)
    _launch_codes(x, factors, scale, None, q, 1)
    return q, scale


def _launch_codes(
    x: Tensor, factors: Tensor | None, scale: Tensor, zero_point: Tensor | None, q: Tensor, samples: int
) -> None:
    rows, ins = x.shape
    if rows:
        block = triton.next_power_of_2(ins)
        with torch.cuda.device_of(x):
            codes_kernel[(rows,)](
                x, factors, scale, zero_point, q, rows // samples, ins, DYNAMIC=zero_point is None, BLOCK=block,
                num_warps=min(max(block // 512, 1), 16), **_IN_ORDER,
            )  # fmt: skip


def _product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, row_scale: Tensor | None,
    samples: int, dtype: torch.dtype, gelu: str,
) -> Tensor:  # fmt: skip
    rows, (outs, ins), y = len(x) // samples, weight.shape, _output_of(x, weight, dtype)
    kind = "float" if x.dtype != torch.int8 else "static" if row_scale is None else "dynamic"
    tile = tile_of(rows, x.dtype)
    if rows:
        grid = triton.cdiv(outs, tile["OUTS"]), triton.cdiv(rows, tile["ROWS"]), samples
        with torch.cuda.device_of(x):
            product_kernel[grid](
                x, weight, scale, bias, row_scale, y, rows, ins, outs, KIND=kind, GELU=gelu, **tile, **_IN_ORDER
            )  # fmt: skip
    return y


def tile_of(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns keyword arguments for `product_kernel`: the sizes ROWS, OUTS and INS of its tile, and Triton's options
    num_warps and num_stages. `rows` is the number of rows in each sample of the kernel's input, and `dtype` the dtype
    of this input.

    The tiles fit in the 99 KiB of shared memory that every GPU since Ampere has. The sizes are estimates; their speed
    was not measured.
    """
    high = 16 if rows <= 16 else 64 if rows <= 64 or dtype == torch.float32 else 128
    wide = 128 if high == 128 else 64
    depth = 128 // dtype.itemsize  # a row of the tile is one line of the cache
    return {"ROWS": high, "OUTS": wide, "INS": depth, "num_warps": 8 if high == 128 else 4, "num_stages": 3}


def _scale_of(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


def _output_of(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=dtype)


_OPERATORS = torch.library.Library("octavo", "FRAGMENT")
_OPERATORS.define("codes(Tensor x, Tensor? factors, Tensor scale, Tensor zero_point) -> Tensor")
_OPERATORS.define("token_codes(Tensor x, Tensor? factors) -> (Tensor, Tensor)")
_OPERATORS.define(
    "scaled_product(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? row_scale, SymInt samples, "
    "ScalarType dtype, str gelu) -> Tensor"
)
for _name, _function in {"codes": _codes, "token_codes": _token_codes, "scaled_product": _product}.items():
    _OPERATORS.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("octavo::codes", lambda x, *_: torch.empty_like(x, dtype=torch.int8))
torch.library.register_fake("octavo::token_codes", lambda x, _: (torch.empty_like(x, dtype=torch.int8), _scale_of(x)))
torch.library.register_fake("octavo::scaled_product", lambda x, weight, *more: _output_of(x, weight, more[-2]))


# --- layers -----------------------------------------------------------------------------------------------------------


def supports(layer: LinearState, x: Tensor) -> bool:
    """Returns whether the kernels can compute `layer` for the input `x`. They can compute any layer, if `x` is
    float32, float16 or bfloat16, is not empty, and needs no gradients."""
    return x.dtype in STORABLE and x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in) for which `supports` returns True. If `gelu` is
    not None, returns GELU of the output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    operators, transform, factors = torch.ops.octavo, layer.transform, None
    if isinstance(transform, Multiply) and not layer.weight_only:
        factors, rows = transform.factors, x
    else:
        rows = layer.transformed(x, -1)
    rows = rows.reshape(-1, x.shape[-1]).contiguous()
    bias: Tensor | None = layer.bias
    scale, row_scale, samples = layer.weight_scale, None, 1
    if layer.calibrated:
        numbers = layer._ranged(len(x) if x.ndim > 1 else None)
        input_scale, zero_point = (parameter.view(-1) for parameter in numbers.input.qparams)
        rows = operators.codes(rows, factors, input_scale, zero_point)
        scale, bias, samples = numbers.deq, numbers.quant_bias, len(input_scale)
    elif not layer.weight_only:
        rows, row_scale = operators.token_codes(rows, factors)
    weight = layer.weight.contiguous()  # not a copy but for a weight that was packed for the CPU before
    y = operators.scaled_product(rows, weight, scale, bias, row_scale, samples, x.dtype, gelu or "")
    return y.view(*x.shape[:-1], layer.out_features)
