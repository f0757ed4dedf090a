"""Operators of torch_npu for MXFP8 on a machine without an NPU, with the results that their documentation defines
(hicann/ops-nn: quant/dynamic_mx_quant, matmul/quant_batch_matmul_v3), written in numpy, independent of the package
under test.

The documentation does not say in which order the device adds products. Here the sum is exact and rounded once to
float32. It does not say either that a number beyond the largest code becomes that code; here it does.
"""

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT8, EXPONENT8 = torch.float8_e4m3fn, "float8_e8m0fnu"
BLOCK = 32


def dynamic_mx_quant(x: Tensor, *, dst_type: Any, axis: int = -1, scale_alg: int = 0) -> tuple[Tensor, Tensor]:
    """Computes npu_dynamic_mx_quant: floats to e4m3 codes, each 32 neighbours of a row with a power of two. Returns the
    codes and the exponents plus 127, (rows, pairs of blocks, 2), padded by 0. `scale_alg` 0 takes the floor of log2 of
    the largest value, 1 the exponent at which no code is beyond 448."""
    assert x.ndim == 2
    assert axis == -1
    assert dst_type == FLOAT8
    assert x.dtype in (torch.float16, torch.bfloat16)
    rows, channels = x.shape
    values = np.pad(x.float().numpy().astype(np.float64), ((0, 0), (0, -channels % BLOCK)))
    blocks = values.reshape(rows, -1, BLOCK)
    largest = np.abs(blocks).max(2)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(largest)) - 8 if scale_alg == 0 else np.ceil(np.log2(largest / 448))
    exponent = np.where(largest > 0, exponent, 0)
    scaled = np.clip(blocks / np.exp2(exponent)[..., None], -448, 448).reshape(rows, -1)[:, :channels]
    scales = np.pad((exponent + 127).astype(np.uint8), ((0, 0), (0, exponent.shape[1] % 2)))
    codes = torch.from_numpy(scaled.astype(np.float32)).to(FLOAT8)
    return codes, torch.from_numpy(scales).view(rows, -1, 2)


def mx_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype,
    scale_dtype: Any, pertoken_scale_dtype: Any, group_sizes: list[int],
) -> Tensor:  # fmt: skip
    """Computes npu_quant_matmul for MXFP8: the product of the values of two matrices of codes, plus the bias. `scale`
    is (pairs of blocks, out, 2), `pertoken_scale` (rows, pairs of blocks, 2)."""
    assert (x1.dtype, x2.dtype) == (FLOAT8, FLOAT8)
    assert (scale_dtype, pertoken_scale_dtype, group_sizes) == (EXPONENT8, EXPONENT8, [1, 1, BLOCK])
    assert (scale.dtype, pertoken_scale.dtype) == (torch.uint8, torch.uint8)
    channels, outputs = x2.shape
    pairs = -(-channels // (2 * BLOCK))
    assert scale.shape == (pairs, outputs, 2)
    assert pertoken_scale.shape == (len(x1), pairs, 2)
    assert bias is None or (bias.dtype, bias.shape) == (torch.float32, (outputs,))
    weight = _values(x2.t(), scale.transpose(0, 1))
    total = torch.from_numpy(_values(x1, pertoken_scale) @ weight.T).to(torch.float32)
    return (total if bias is None else total + bias).to(output_dtype)


def _values(codes: Tensor, scales: Tensor) -> np.ndarray:
    powers = np.exp2(scales.reshape(len(codes), -1).numpy().astype(np.float64) - 127)
    return codes.float().numpy().astype(np.float64) * powers.repeat(BLOCK, 1)[:, : codes.shape[1]]


def put_into(torch_npu: ModuleType) -> None:
    """Gives the stand-in module `torch_npu` the operators for MXFP8. An operator npu_quant_matmul that the module has
    is called without group_sizes as before."""
    integers = getattr(torch_npu, "npu_quant_matmul", None)

    def quant_matmul(*arguments: Any, **options: Any) -> Any:
        return (mx_quant_matmul if "group_sizes" in options else integers)(*arguments, **options)

    operators = {
        "float8_e4m3fn": FLOAT8, "float8_e8m0fnu": EXPONENT8, "npu_dynamic_mx_quant": dynamic_mx_quant,
        "npu_quant_matmul": quant_matmul, "npu_dtype_cast": lambda x, dtype: x.to(dtype),
    }  # fmt: skip
    for name, value in operators.items():
        setattr(torch_npu, name, value)
