"""The numpy functions for e4m3 give the numbers that torch gives, and blocks of inputs those of MXFP8 layers."""

import numpy as np
import pytest
import torch

from octavo.calibrate.formats.e4m3 import VALUES, in_blocks, is_nan, rounded
from octavo.calibrate.layers.schemes import BLOCK

from ...zoo.layer_kinds import input_of


def test_each_code_stands_for_torch_s_number():
    bits = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(VALUES, wanted, equal_nan=True)
    assert np.array_equal(is_nan(bits), np.isnan(wanted))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_torch_s_cast(dtype):
    generator = np.random.default_rng(0)
    x = generator.standard_normal(20000) * np.exp2(generator.integers(-14, 10, 20000))
    halves = (VALUES[:126] + VALUES[1:127]) / 2
    x = np.concatenate([x, halves, -halves, VALUES[:127], [1e6, -1e6, 0.0]]).astype(dtype)
    wanted = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float32).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(rounded(x.astype(np.float32)).astype(np.float32), wanted)


def test_blocks_become_the_codes_of_a_clamping_layer():
    x = torch.randn(7, 96) * torch.exp2(torch.randint(-20, 20, (7, 96)).float())
    x[0, :32] = 0.0
    x[1, 32:64] = 448.0
    x[1, 40] = 500.0  # is clamped
    codes = input_of("W8A8_MXFP8", torch.float32, clamping=True).codes(x)
    assert np.array_equal(in_blocks(x.numpy(), BLOCK), (codes.q * codes.scale).double().numpy())
    other = input_of("W8A8_MXFP8", torch.float32).codes(x)
    assert not torch.equal(other.q * other.scale, codes.q * codes.scale)
