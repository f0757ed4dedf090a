"""Every observer chooses the documented range, which depends on the values alone and not on their order or batches."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.scheme import ACTIVATION, SYMMETRIC_ACTIVATION, Range
from octavo.calibrate.observers.exact_sum import ExactSum
from octavo.calibrate.observers.histogram import Histogram, squared_error
from octavo.calibrate.observers.observers import OBSERVERS, MinMax, Options, Sigma
from octavo.calibrate.observers.token_sums import row_sums_of

from ...helpers.examples import examples
from ...zoo.toy import DTYPES

seeds = st.integers(0, 2**32 - 1)
names = st.sampled_from(sorted(OBSERVERS))


def observed(name: str, tensors: list[torch.Tensor], options: Options = Options()):  # noqa: B008
    observer = OBSERVERS[name](options)
    for x in tensors:
        observer.add(observer.read(x))
    return observer


def sample(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns tokens of very different sizes and means, whose sums in floating point would depend on the order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, 1 + seed % 40, generator=generator)
    x = x * 10.0 ** torch.randint(-4, 4, (12, 5, 1), generator=generator)
    return (x + 3 * (torch.rand(12, 5, 1, generator=generator) < 0.3)).to(dtype)


@examples(400)
@given(seeds, names, st.sampled_from(DTYPES), st.sampled_from([0.5, 3.0, 25.0]))
def test_any_order_split_and_merge_tree_gives_the_same_bits(seed, name, dtype, sigma):
    x = sample(seed, dtype)
    options = Options(sigma, 90.0)
    wanted = observed(name, [x], options).range()
    chance = random.Random(seed)
    parts = list(x.split(chance.randint(1, 5), 0))
    parts = [piece for part in parts for piece in part.split(chance.randint(1, 5), 1)]  # split along tokens, too
    chance.shuffle(parts)
    observers = [observed(name, [part.contiguous() if chance.random() < 0.5 else part], options) for part in parts]
    while len(observers) > 1:
        one = observers.pop(chance.randrange(len(observers)))
        observers[chance.randrange(len(observers))].merge(one)
    extent = observers[0].range()
    assert struct_of(extent) == struct_of(wanted)


def struct_of(extent: Range) -> tuple[str, str]:
    return extent.low.hex(), extent.high.hex()


def test_sums_in_floating_point_do_depend_on_the_order():
    values = [1e16, 1.0, -1e16] * 3 + [0.1] * 5
    sums = {sum(random.Random(seed).sample(values, len(values))) for seed in range(20)}
    assert len(sums) > 1


@examples(500)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40), st.integers(0, 40))
def test_exact_sums_are_exact(values, cut):
    one, other = ExactSum(), ExactSum()
    one.add(np.array(values[:cut]))
    other.add(np.array(values[cut:]))
    with np.errstate(over="ignore"):
        narrow = np.array(values, dtype=np.float32)
    narrow = narrow[np.isfinite(narrow)]
    other.add(narrow)
    one.merge(other)
    assert one.value() == sum((Fraction(value) for value in [*values, *narrow.tolist()]), Fraction(0))


def sums_of(x: torch.Tensor) -> np.ndarray:
    """Returns the sums and the sums of squares of rows and of their pieces, sorted."""
    pieces = row_sums_of([Sigma.read(x).rows])
    return np.sort(np.concatenate(pieces, 1, dtype=np.float64))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 3, 17, 160, 4095, 4097, 70000])
def test_a_token_sums_to_the_same_alone_and_among_others(threads, width):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(9, width) * torch.logspace(-3, 3, 9).view(-1, 1) + torch.arange(9).view(-1, 1)
        together = sums_of(x)
        transposed = sums_of(x.t().contiguous().t())
        alone = np.sort(np.concatenate([sums_of(row[None]) for row in x], -1))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(together, alone)
    assert np.array_equal(together, transposed)


@examples(300)
@given(seeds, st.sampled_from(DTYPES), st.floats(0.1, 5))
def test_sigma_is_mean_and_deviations_within_the_extremes(seed, dtype, sigma):
    x = sample(seed, dtype)
    exact = x.double()
    mean, std = exact.mean().item(), exact.std(correction=0).item()
    extent = observed("sigma", [x], Options(sigma)).range()
    low, high = exact.min().item(), exact.max().item()
    slack = 1e-6 * (std + abs(mean))
    assert extent.low == pytest.approx(max(low, mean - sigma * std), abs=sigma * slack + slack)
    assert extent.high == pytest.approx(min(high, mean + sigma * std), abs=sigma * slack + slack)
    assert low <= extent.low <= extent.high <= high


def test_sigma_zero_means_the_extremes():
    x = torch.randn(50, 8)
    assert observed("sigma", [x], Options(0.0)).range() == observed("minmax", [x]).range()


def test_a_small_deviation_around_a_large_mean_is_not_lost():
    x = 1000.0 + 0.01 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    mean, std = observed("sigma", [x[:10], x[10:]]).moments()
    assert mean == pytest.approx(x.double().mean().item(), rel=1e-9)
    assert std == pytest.approx(x.double().std(correction=0).item(), rel=1e-6)
    in_float32 = (x.square().mean() - x.mean().square()).item()
    assert in_float32 != pytest.approx(std**2, rel=0.1)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e25])
def test_sigma_has_no_scale_of_its_own(factor):
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    _, std = observed("sigma", [x * factor]).moments()
    assert std == pytest.approx(x.double().std(correction=0).item() * factor, rel=1e-5)


@examples(200)
@given(seeds, st.integers(-30, 30), names)
def test_a_power_of_two_scales_the_range(seed, power, name):
    x = sample(seed)
    options = Options(2.0, 95.0)
    one, other = observed(name, [x], options).range(), observed(name, [x * 2.0**power], options).range()
    assert (one.low * 2.0**power, one.high * 2.0**power) == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name, bad):
    x = torch.zeros(4, 5)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 20 values are not finite"):
        OBSERVERS[name](Options()).read(x)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_no_values_and_no_tensors_are_refused(name):
    observer = OBSERVERS[name](Options())
    with pytest.raises(ValueError, match="no values"):
        observer.read(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="no input was observed"):
        observer.range()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_zeros_alone_are_a_range(name):
    extent = observed(name, [torch.zeros(3, 4), -torch.zeros(2, 4)]).range()
    assert extent == Range(0.0, 0.0)
    assert math.copysign(1, extent.low) == math.copysign(1, extent.high) == 1


def test_percentiles_leave_out_what_they_say():
    x = torch.cat([torch.linspace(-1, 1, 9980), torch.tensor([1e3] * 10 + [-1e3] * 10)])[None]
    low, high = observed("percentile", [x], Options(percentile=99.9)).range()
    assert -1.2 < low <= -0.99
    assert 0.99 <= high < 1.2
    assert observed("percentile", [x], Options(percentile=100.0)).range() == Range(-1e3, 1e3)


def test_the_percentile_of_more_than_2_to_the_24_values():
    x = torch.rand(4200, 4000).half()
    with pytest.raises(RuntimeError):
        torch.quantile(x.flatten(), 0.99)
    low, high = observed("percentile", [x], Options(percentile=99.0)).range()
    assert low == pytest.approx(0.01, abs=2e-3)
    assert high == pytest.approx(0.99, abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([ACTIVATION, SYMMETRIC_ACTIVATION]))
def test_mse_is_no_worse_than_the_extremes(seed, scheme):
    x = sample(seed)
    values = x.double().flatten().numpy()
    ones = np.ones(len(values), dtype=np.int64)
    clip = observed("mse", [x], Options(scheme=scheme)).range()
    extremes = observed("minmax", [x]).range()
    whole = Range(min(extremes.low, 0.0), max(extremes.high, 0.0))
    slack = (max(-whole.low, whole.high) / 4096) ** 2 * len(values)  # the observer sees bins in place of values
    assert squared_error(ones, values, clip, scheme) <= squared_error(ones, values, whole, scheme) * 1.02 + slack


def test_mse_cuts_off_an_outlier_that_costs_more_than_it_is():
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 60.0
    assert 5.0 < observed("mse", [x]).range().high < 40.0


def test_bins_are_the_values_they_count():
    x = torch.tensor([[-3.0, -0.1, 0.0, 0.1, 4.0]])
    counts, edges, width = Histogram.of(x).bins()
    assert counts.sum() == 5
    assert all(any(edge <= value < edge + width for edge in edges) for value in x[0].double().tolist())


def test_the_extremes_have_no_negative_zero():
    assert math.copysign(1, observed("minmax", [torch.tensor([[-0.0, 1.0]])]).range().low) == 1
    assert MinMax(Options()).read(torch.tensor([-0.0])) == (0.0, 0.0)
