"""Operators of torch_npu for a machine without an NPU: their schemas, and the results that their documentation defines.

The schemas are those that torch_npu 2.14.0 registers (csrc/aten/npu_native_functions_by_codegen.yaml). The dtypes that
an operator accepts are those in its docstring, for Atlas A2. The formulas are those of the operators' library
(hicann/ops-nn: quant/quantize, quant/dynamic_quant, matmul/quant_batch_matmul_v3), written in numpy, independent of the
package under test.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

SCHEMAS = {
    "npu_quantize": "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
    "bool div_mode=True) -> Tensor",
    "npu_dynamic_quant": "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_quant_matmul": "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
}
# The numbers that stand for dtypes in arguments that a schema declares as int.
NUMBERS = {torch.int32: 3, torch.float16: 5, torch.qint8: 12, torch.bfloat16: 15}
ACCEPTED_DTYPES = {  # for each output dtype: (dtype of scale, dtype of bias, whether pertoken_scale is given)
    torch.float16: {(torch.int64, torch.int32, False), (torch.float32, torch.int32, False)}
    | {(torch.float32, bias, True) for bias in (torch.int32, torch.float16, torch.float32, None)},
    torch.bfloat16: {(torch.float32, bias, False) for bias in (torch.int32, torch.bfloat16, torch.float32, None)}
    | {(torch.float32, bias, True) for bias in (torch.int32, torch.bfloat16, torch.float32, None)},
    torch.int32: {(torch.float32, torch.int32, False), (torch.float32, None, False)},
}


def quantize(x: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True):
    """Computes npu_quantize: floats to int8, out = round(x / scales + zero_points), with one scale or one for each
    index of `axis`. Quotient and sum are float32, rounding is half to even, int8 saturates."""
    assert div_mode
    assert dtype == NUMBERS[torch.qint8]
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert zero_points is not None
    kinds = {x.dtype, scales.dtype, zero_points.dtype}
    if torch.bfloat16 in (scales.dtype, zero_points.dtype):
        assert kinds == {torch.bfloat16}
    else:
        assert scales.dtype == torch.float32
        assert zero_points.dtype in (torch.int8, torch.uint8, torch.int32)
    assert scales.shape == zero_points.shape
    assert scales.shape in ((1,), (x.shape[axis],))
    around = [-1 if index == axis % x.ndim else 1 for index in range(x.ndim)]
    scale, zero_point = (tensor.float().numpy().reshape(around) for tensor in (scales, zero_points))
    quotient = np.divide(x.float().numpy(), scale, dtype=np.float32)
    total = np.add(quotient, zero_point, dtype=np.float32)
    return torch.from_numpy(np.clip(np.rint(total), -128, 127).astype(np.int8))


def dynamic_quant(x: Tensor, *, smooth_scales=None, **_):
    """Computes npu_dynamic_quant: floats to int8 with a scale for each row. Returns the codes and the scales."""
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert x.ndim > 1
    assert smooth_scales is None
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, *, output_dtype=None, pertoken_scale=None, bias=None, **_):
    """Computes npu_quant_matmul: the product of two int8 matrices, times the scales, plus the bias."""
    assert (x1.dtype, x2.dtype) == (torch.int8, torch.int8)
    assert x1.is_contiguous()
    assert scale.shape in ((1,), (x2.shape[1],))
    assert max(x1.shape[-1], x2.shape[-1]) <= 65535
    out = {NUMBERS[dtype]: dtype for dtype in ACCEPTED_DTYPES}[output_dtype]
    total = (x1.double() @ x2.double()).to(torch.int32)
    kinds = scale.dtype, None if bias is None else bias.dtype, pertoken_scale is not None
    assert kinds in ACCEPTED_DTYPES[out], f"{kinds} does not put out {out}"
    if scale.dtype == torch.int64:
        scale = (scale & 0xFFFFE000).to(torch.int32).view(torch.float32)  # the operator reads 19 bits of the low half
    if pertoken_scale is None:
        total = total if bias is None else total + bias
        return total if out == torch.int32 else (total.float() * scale).to(out)
    assert pertoken_scale.shape == (len(x1),)
    y = total.float() * (scale * pertoken_scale.unsqueeze(1))
    return (y if bias is None else y + bias).to(out)


KERNELS = {"npu_quantize": quantize, "npu_dynamic_quant": dynamic_quant, "npu_quant_matmul": quant_matmul}


@contextmanager
def npu_operators() -> Iterator[None]:
    """Registers the operators as torch.ops.npu inside the block."""
    library = torch.library.Library("npu", "FRAGMENT")
    for name, kernel in KERNELS.items():
        library.define(SCHEMAS[name])
        library.impl(name, kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()
