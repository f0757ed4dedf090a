"""The tensors and the description of quantized attention are those that MindIE-SD reads."""

import pytest
import torch

from octavo.calibrate.attention.measure import AttentionRow
from octavo.calibrate.attention.names import COMFY_INT8, FP8, MXFP8
from octavo.calibrate.formats.ascend.attention import attention_tensors
from octavo.capture.errors import UsageError


def row(type: str, rotation: str, width: int) -> AttentionRow:
    return AttentionRow("unused", type, rotation, width, (50.0,), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_rotations_are_one_orthogonal_matrix(dtype):
    rows = {"blocks.0.attn1": row(MXFP8, "hadamard", 128), "blocks.1.attn1": row(FP8, "none", 12),
            "blocks.2.attn1": row(FP8, "orthogonal", 12)}  # fmt: skip
    tensors, description = attention_tensors(rows, dtype)
    assert set(tensors) == {f"{name}.{end}" for name in rows for end in ("q_rot", "k_rot")}
    assert description == {
        **dict.fromkeys(tensors, "FLOAT"),
        "blocks.0.attn1.quant_type": "MXFP8_DYNAMIC",
        "blocks.1.attn1.quant_type": "FP8_DYNAMIC",
        "blocks.2.attn1.quant_type": "FP8_DYNAMIC",
    }
    for name, one in rows.items():
        q, k = (tensors[f"{name}.{end}"] for end in ("q_rot", "k_rot"))
        matrix = q.make()
        assert q.dtype == matrix.dtype == dtype
        assert q.shape == matrix.shape == (one.width, one.width)
        assert torch.equal(matrix, k.make())
        product = matrix.double() @ matrix.double().t()
        assert torch.allclose(product, torch.eye(one.width).double(), atol=1e-6 if dtype == torch.float32 else 5e-3)
    assert torch.equal(tensors["blocks.1.attn1.q_rot"].make(), torch.eye(12, dtype=dtype))


def test_other_types_are_refused():
    with pytest.raises(UsageError, match="comfy_kitchen_int8"):
        attention_tensors({"attn": row(COMFY_INT8, "hadamard", 64)}, torch.bfloat16)
