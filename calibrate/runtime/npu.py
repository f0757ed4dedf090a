"""The NPU backend: calls operators of torch_npu as MindIE-SD does, with the codes, scales, zero points and biases of
the checkpoint.

npu_quantize(x, scales, zero_points, qint8)     round(x / scales + zero_points)
npu_dynamic_quant(x)                            round(x / scale) and scale, with scale = max |x| / 127 for each row
npu_quant_matmul(q, weight.T, scale, bias=b)    (q @ weight.T + b) * scale, where b is int32
  with pertoken_scale=s                         q @ weight.T * scale * s + b, where b is float32

q holds the int8 codes of the input. The scale of npu_quant_matmul is deq; for a dynamic layer it is the weight's scale,
and s is the scale of each row of the input. npu_quant_matmul returns float16 or bfloat16. For a float32 input it is
called only for the int32 sums q @ weight.T, and torch computes the rest.
"""

import torch
from torch import Tensor

from ..layers.freeze import packed
from .int8_layer import Conv2dState, LinearState
from .int8_matmul import convolution
from .reference import activated
from .reference import linear as reference_linear

_OUT = (torch.float16, torch.bfloat16)  # dtypes that npu_quant_matmul can return


def linear(layer: LinearState, x: Tensor, gelu: str | None = None) -> Tensor:
    """Returns the output of `layer` for `x`, a float tensor (..., in). If `gelu` is not None, returns GELU of the
    output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
    if layer.weight_only or not x.numel():
        return reference_linear(layer, x, gelu)
    if x.dtype not in _OUT:
        return activated(layer.computed(x, _matmul), gelu)
    rows = layer.transformed(x, -1).reshape(-1, x.shape[-1]).contiguous()
    if not layer.calibrated:
        return activated(_dynamic(layer, rows).view(*x.shape[:-1], -1), gelu)
    bins = layer.bins(len(x) if x.ndim > 1 else None)
    if isinstance(bins, int):
        y = _static(layer, rows, bins)
    else:
        y = torch.cat(
            [_static(layer, sample, index) for sample, index in zip(rows.chunk(len(bins)), bins, strict=True)]
        )
    return activated(y.view(*x.shape[:-1], -1), gelu)


def _static(layer: LinearState, rows: Tensor, index: int) -> Tensor:
    outs = layer.out_features
    scale, zero_point = (parameter.view(1) for parameter in layer.qparams(index))
    q = torch.ops.npu.npu_quantize(rows, scale, zero_point, torch.qint8)
    deq, bias = layer.deq.view(-1, outs)[index], layer.quant_bias.view(-1, outs)[index]
    deq = packed(deq) if rows.dtype == torch.float16 else deq  # for float16 the operator needs deq packed in int64
    return _product(layer, q, deq, rows.dtype, bias=bias)


def _dynamic(layer: LinearState, rows: Tensor) -> Tensor:
    q, scale = torch.ops.npu.npu_dynamic_quant(rows)
    bias = None if layer.bias is None else layer.bias.float()
    return _product(layer, q, layer.weight_scale, rows.dtype, pertoken_scale=scale, bias=bias)


def _product(
    layer: LinearState, q: Tensor, scale: Tensor, dtype: torch.dtype, *, bias: Tensor | None, **more: Tensor
) -> Tensor:
    y: Tensor = torch.ops.npu.npu_quant_matmul(q, layer.weight.t(), scale, bias=bias, output_dtype=dtype, **more)
    return y


def _matmul(q: Tensor, weight: Tensor) -> Tensor:
    rows, ones = q.reshape(-1, q.shape[-1]).to(torch.int8).contiguous(), torch.ones(1, device=q.device)
    total: Tensor = torch.ops.npu.npu_quant_matmul(rows, weight.t(), ones, output_dtype=torch.int32)
    return total.view(*q.shape[:-1], -1)


def conv2d(layer: Conv2dState, x: Tensor) -> Tensor:
    """Returns the output of the convolution `layer` for `x`, a float tensor (batch, in, height, width) or (in, height,
    width)."""
    return layer.computed(x, convolution(layer, _matmul))
