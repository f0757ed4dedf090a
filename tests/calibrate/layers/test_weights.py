"""Weights to integers, channel by channel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from octavo.calibrate.layers.scheme import WEIGHT, QParams, dequantize
from octavo.calibrate.layers.weights import check_finite, round_to_nearest
from octavo.capture.paging import page_out

from ...helpers.examples import examples
from ...helpers.refusals import refused
from ...zoo.toy import DTYPES

many = examples(1000)
seeds = st.integers(0, 2**32 - 1)


def weight(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 10)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    made = torch.randn(shape, generator=generator) * spread
    made[seed % shape[0]] = 0.0
    return made.to(dtype)


@many
@given(seeds, st.sampled_from(DTYPES))
def test_each_channel_reaches_127_and_none_128(seed, dtype):
    w = weight(seed, dtype)
    made = round_to_nearest(w)
    largest = made.weight.int().abs().amax(1)
    assert bool((made.scale > 0).all() and made.scale.isfinite().all())
    assert torch.equal(largest == 127, (w != 0).any(1))
    assert int(made.weight.min()) >= -127


@many
@given(seeds, st.sampled_from(DTYPES))
def test_codes_are_those_of_float64_to_one_and_within_half_a_step(seed, dtype):
    w = weight(seed, dtype)
    made = round_to_nearest(w)
    exact = w.double().abs().amax(1, keepdim=True) / 127
    wanted = (w.double() / torch.where(exact > 0, exact, 1.0)).round()
    assert (made.weight.double() - wanted).abs().max() <= 1
    back = made.weight.double() * made.scale.double().view(-1, 1)
    assert bool(((back - w.double()).abs() <= made.scale.double().view(-1, 1) * 0.5001).all())


@many
@given(seeds)
def test_permuted_channels_give_permuted_integers(seed):
    w = weight(seed)
    rows = torch.randperm(w.shape[0], generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    one, other = round_to_nearest(w), round_to_nearest(w[rows][:, columns])
    assert torch.equal(one.weight[rows][:, columns], other.weight)
    assert torch.equal(one.scale[rows], other.scale)


def test_a_channel_of_zeros_has_scale_one():
    made = round_to_nearest(torch.tensor([[0.0, -0.0], [1.0, -2.0]]))
    assert made.scale[0] == 1.0
    assert made.weight[0].tolist() == [0, 0]


@many
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([1.0, -1.0]))
def test_a_constant_channel_comes_back_to_an_ulp(value, sign):
    w = torch.full((1, 5), value * sign)
    made = round_to_nearest(w)
    back = dequantize(made.weight, QParams(made.scale, torch.zeros(1)), WEIGHT)
    assert bool(((back - w).abs() <= torch.finfo(torch.float32).eps * w.abs()).all())


def test_weights_too_small_for_a_scale_are_left():
    assert round_to_nearest(torch.tensor([[1e-38, 1e-39]])) is None


def test_scales_of_float16_weights_are_float32():
    assert round_to_nearest(torch.randn(3, 4).half() * 1e-4).scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(bad, dtype):
    w = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    check_finite("blocks.3.to_q.weight", w)
    w[3, 4] = bad
    refused(
        lambda: check_finite("blocks.3.to_q.weight", w),
        6,
        "blocks.3.to_q.weight: 1 of 4096 values are not finite",
    )


def test_a_weight_paged_out_of_its_file_reads_the_same(tmp_path):
    torch.manual_seed(0)
    saved = {"a": torch.randn(300, 1000), "b": torch.randn(7), "c": torch.randn(999, 3)}
    save_file(saved, tmp_path / "weights.safetensors")
    mapped = load_file(tmp_path / "weights.safetensors")
    own = {name: tensor.clone() for name, tensor in saved.items()}
    for tensor in (*mapped.values(), *own.values()):
        page_out(tensor)
    for name, tensor in saved.items():
        assert torch.equal(mapped[name], tensor)
        assert torch.equal(own[name], tensor)


def test_what_was_written_into_a_mapped_weight_stays(tmp_path):
    save_file({"a": torch.zeros(300, 1000)}, tmp_path / "weights.safetensors")
    mapped = load_file(tmp_path / "weights.safetensors")["a"]
    mapped[150] = 1.0
    borrowed = torch.from_numpy(np.ones((300, 1000)))
    for tensor in (mapped, borrowed):
        page_out(tensor)
    assert float(mapped.sum()) == 1000.0
    assert float(borrowed.sum()) == 300000.0
