"""Attention of every type equals a slow reference in float64; a rotation changes no float attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibrate.attention import codes
from octavo.calibrate.attention.inputs import Inputs, attended
from octavo.calibrate.attention.kinds import KINDS
from octavo.calibrate.attention.names import ASCEND, ATTENTION_TYPES, COMFY_INT8
from octavo.calibrate.attention.rotations import HADAMARD, ORTHOGONAL, kind_of, rotation_of, walsh

from .reference import outputs

SHAPES = {  # (batch, heads, rows, keys, width)
    "self": (2, 2, 40, 40, 32),
    "cross": (1, 2, 5, 77, 12),
    "one key": (1, 1, 3, 1, 16),
    "one row": (1, 1, 1, 9, 8),
    "many keys": (1, 1, 140, 300, 96),
}


def tensors(batch: int, heads: int, rows: int, keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * keys + width)
    query, key, value = (torch.randn(batch, heads, count, width, generator=generator) for count in (rows, keys, keys))
    return query, 1.0 + 2.0 * key, value


def db(exact: Tensor, other: Tensor) -> float:
    return 10 * torch.log10(exact.double().square().sum() / (exact.double() - other.double()).square().sum()).item()


@pytest.mark.parametrize("width", [1, 2, 8, 12, 16, 32, 64, 80, 128, 256])
def test_rotations_are_orthogonal(width):
    matrix = rotation_of(width)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert kind_of(width) == (ORTHOGONAL if width in (12, 80) else HADAMARD)
    if width in (16, 32, 64, 128, 256):
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))
        largest = (torch.ones(width, dtype=torch.float64) @ matrix).abs().max()
        assert largest <= 2**0.5 * 1.001  # a constant offset of all channels stays about as small in each


@pytest.mark.parametrize(("width", "group", "signed"), [(64, 4, False), (64, 64, False), (128, 128, True)])
def test_the_rotation_of_comfy_s_kernel_is_orthogonal_in_groups(width, group, signed):
    matrix = walsh(width, group, signed=signed)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix != 0, torch.block_diag(*[torch.ones(group, group)] * (width // group)) != 0)


@pytest.mark.parametrize("width", [12, 32, 64, 128])
def test_a_rotation_leaves_float_attention_unchanged(width):
    query, key, value = tensors(2, 3, 17, 29, width)
    rotation = rotation_of(width).float()
    exact = F.scaled_dot_product_attention(query, key, value)
    rotated = attended(query @ rotation, key @ rotation, value, None, width**-0.5)
    assert torch.allclose(exact, rotated, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("type", ATTENTION_TYPES)
def test_every_type_equals_a_slow_reference(type, name, rotated):
    query, key, value = tensors(*SHAPES[name])
    inputs = Inputs.of(query, key, value)
    result = KINDS[type].run(inputs, rotated, torch.arange(query.shape[-2]))
    expected = outputs(type, query, key, value, None, rotated)
    error = db(outputs(None, query, key, value, None, False), expected)
    # a code on the border of two may differ: by far less than the error of the type itself
    assert db(expected, result) > min(max(error + 15, 40), 90)


@pytest.mark.parametrize("type", ATTENTION_TYPES)
def test_masks_and_rows_without_a_key(type):
    query, key, value = tensors(1, 2, 6, 70, 16)
    mask = torch.rand(6, 70, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[2] = False
    mask[3, 1:] = False
    exact = F.scaled_dot_product_attention(query, key, value, mask)
    inputs = Inputs.of(query, key, value, mask)
    assert torch.allclose(attended(query, key, value, inputs.bias, inputs.scale), exact, atol=1e-5)
    result = KINDS[type].run(inputs, True, torch.arange(6))
    assert not result[:, :, 2].any()
    expected = outputs(type, query, key, value, inputs.bias, True)
    assert db(expected, result) > 40
    assert torch.allclose(result[:, :, [3, 1]], KINDS[type].run(inputs, True, torch.tensor([3, 1])), atol=1e-6)


def test_arguments_of_torch_s_function_give_its_output():
    query, key, value = tensors(2, 4, 9, 9, 8)
    few = key[:, :2], value[:, :2]
    bias = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(0))
    for args, kwargs in (
        ((query, key, value), {"is_causal": True}),
        ((query, key, value, bias), {"scale": 0.3}),
        ((query, *few), {"enable_gqa": True}),
        ((query[0], key[0], value[0, :, :, :5]), {}),
        ((query[0, 0], key[0, 0], value[0, 0]), {}),
        ((query[None], key[None], value[None]), {"attn_mask": torch.ones(9, 9, dtype=torch.bool)}),
    ):
        inputs = Inputs.of(*args, **kwargs)
        exact = F.scaled_dot_product_attention(*args, **kwargs)
        result = attended(inputs.query, inputs.key, inputs.value, inputs.bias, inputs.scale)
        assert torch.allclose(exact, result.reshape(exact.shape), atol=1e-5)
    assert inputs.bias is None  # a mask that hides nothing


@pytest.mark.parametrize("keys", [64, 300])
def test_a_head_with_outliers_in_a_channel_gains_by_a_rotation_in_int8(keys):
    def errors(type: str) -> list[float]:
        return [db(exact, KINDS[type].run(inputs, rotated, torch.arange(32))) for rotated in (False, True)]

    query, key, value = tensors(1, 1, 32, keys, 64)
    key[..., 3] *= 100.0
    query[..., 3] /= 100.0
    exact = F.scaled_dot_product_attention(query, key, value)
    inputs = Inputs.of(query, key, value)
    plain, rotated = errors(COMFY_INT8)
    assert rotated > plain + 3
    for type in ASCEND:  # the codes of e4m3 are as fine for small channels as for the outliers, unless they are mixed
        plain, rotated = errors(type)
        assert plain > rotated + 3


def test_zeros_stay_zeros_and_outputs_stay_finite():
    zeros = torch.zeros(1, 1, 40, 20)
    for coded in (codes.fp8_blocks(zeros, 128), codes.mx_channels(zeros), codes.mx_tokens(zeros),
                  codes.int8_queries(zeros, 32), codes.int8_keys(zeros, 64), codes.int8_values(zeros)):  # fmt: skip
        assert not coded.any()
        assert coded.shape == zeros.shape
