"""The compiled kernels read an input once and give the bits of torch, or for sums those of a fixed order."""

import math
import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.calibrate.native import kernels
from octavo.calibrate.observers import exact_sum, extremes, survey, token_sums

from ...helpers.examples import examples

pytestmark = pytest.mark.skipif(not kernels.targets(), reason="no kernels were compiled for this processor")

seeds = st.integers(0, 2**32 - 1)
targets = st.sampled_from(sorted(kernels.targets()) or [""])
dtypes = st.sampled_from(sorted(kernels.TYPES, key=str))
widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 160, 511, 4097]))


def tensor(seed: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of random layout: contiguous, a slice, expanded or transposed; with zeros of both signs."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = (chance.randint(1, 4), chance.randint(1, 11), width)
    x = torch.randn(shape, generator=generator) * 10.0 ** chance.randint(-6, 4)
    x[torch.rand(shape, generator=generator) < 0.2] *= 0.0
    x = x.to(dtype)
    layouts = [
        x,
        x[:, : 1 + shape[1] // 2],
        x[:, :1].expand(shape),
        x.transpose(0, 2).contiguous().transpose(0, 2),
        x[0],
        x[0, 0],
        x[:, None],
        x[..., : 1 + width // 2],
    ]
    return chance.choice(layouts)


def ordered_sum(values: np.ndarray) -> float:
    """Adds float64 numbers in the order that native/statistics.c documents."""
    lanes = np.zeros(16)
    for start in range(0, len(values), 16):
        part = values[start : start + 16]
        lanes[: len(part)] += part
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    return float(lanes[0])


@examples(300)
@given(seeds, widths, dtypes, targets)
def test_extremes_have_the_bits_of_torch(seed, width, dtype, target):
    x, kernel = tensor(seed, width, dtype), kernels.targets()[target]
    wanted = extremes._torch_extremes(x)
    assert [end.hex() for end in kernel.extremes(x)] == [end.hex() for end in wanted]
    assert [end.hex() for end in kernel.row_statistics(x)[:2]] == [end.hex() for end in wanted]
    with patch.object(extremes, "kernels_for", lambda x: None):
        channels = extremes.channels_of(x)
    ends = kernel.column_extremes(x)
    for one, other in zip(ends, channels[:2], strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@examples(300)
@given(seeds, widths, dtypes, targets)
def test_rows_are_summed_in_the_documented_order(seed, width, dtype, target):
    x = tensor(seed, width, dtype)
    rows = x.reshape(-1, x.shape[-1]).double().numpy()
    statistics = kernels.targets()[target].row_statistics(x)
    assert statistics.sums.tolist() == [ordered_sum(row) for row in rows]
    assert statistics.squares.tolist() == [ordered_sum(row * row) for row in rows]


@examples(100)
@given(seeds, widths, dtypes, targets, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_values_that_are_not_finite_are_found(seed, width, dtype, target, bad):
    x, kernel = tensor(seed, width, dtype).clone(), kernels.targets()[target]
    x[np.unravel_index(seed % x.numel(), x.shape)] = bad
    assert kernel.extremes(x) is kernel.row_statistics(x) is kernel.column_extremes(x) is None


@pytest.mark.parametrize("target", kernels.targets())
@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-45, -1e-45, 1e-38])
def test_the_largest_and_the_smallest_numbers_are_read(target, value):
    x, kernel = torch.full((3, 19), value), kernels.targets()[target]
    exact = float(x[0, 0])
    assert kernel.extremes(x) == (exact, exact)
    _, _, sums, squares = kernel.row_statistics(x)
    assert sums == pytest.approx([19 * exact] * 3, rel=1e-12)
    assert squares == pytest.approx([19 * exact**2] * 3, rel=1e-12)


@pytest.mark.parametrize("target", kernels.targets())
@pytest.mark.parametrize("shape", [(3, 700, 160), (1, 5, 60000), (1, 1, 300001)])
def test_threads_change_nothing(target, shape):
    x, kernel, before = torch.randn(shape), kernels.targets()[target], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((kernel.extremes(x), *kernel.row_statistics(x), kernel.column_extremes(x)))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


@examples(200)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40), targets)
def test_exact_sums_are_those_without_kernels(values, target):
    kernel, one, other = kernels.targets()[target], exact_sum.ExactSum(), exact_sum.ExactSum()
    with patch.object(exact_sum, "library", lambda: kernel):
        one.add(np.array(values))
    with patch.object(exact_sum, "library", lambda: None):
        other.add(np.array(values))
    assert one.value() == other.value()


def test_without_kernels_moments_differ_in_the_last_digits_only():
    x = torch.randn(9, 300) + 1.0
    moments = []
    for loaded in (kernels.library(), None):
        with patch.object(token_sums, "kernels_for", lambda x, loaded=loaded: loaded):
            total = token_sums.Moments()
            total.add([token_sums.read_tokens(x)[1]])
            moments.append(total.mean_and_std())
    assert moments[0] == pytest.approx(moments[1], rel=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (40, 7), (2, 9, 7), (2, 3, 4, 7)])
def test_sampled_rows_are_those_of_the_flat_tensor(shape):
    x = torch.randn(*shape[:-1], 9)[..., :7] if len(shape) > 1 else torch.randn(shape)
    rows = x.reshape(-1, 7)
    count = min(8, len(rows))
    assert torch.equal(survey.survey_of(x).rows, rows[torch.arange(count) * len(rows) // count])


def test_other_dtypes_and_no_values_are_left_to_torch():
    assert kernels.kernels_for(torch.zeros(3, 4, dtype=torch.float64)) is None
    assert kernels.kernels_for(torch.zeros(0, 4)) is None
    assert kernels.kernels_for(torch.zeros(3, 4, device="meta")) is None
