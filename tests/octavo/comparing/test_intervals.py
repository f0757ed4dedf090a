"""Checks the 95 % intervals of a comparison, and the estimate of how many more pairs narrow them."""

import numpy as np
import pytest

from octavo.comparing.intervals import (
    more_groups,
    more_groups_of_share,
    ratio_interval,
    share_interval,
)


def mean_interval(values, prompts=None):
    return ratio_interval(values, [1.0] * len(values), prompts or [str(index) for index in range(len(values))])


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(10.0, 2.0, (300, 8))
    covered = [low <= 10.0 <= high for low, high in map(mean_interval, samples)]
    assert 0.91 <= np.mean(covered) <= 0.985


def test_seeds_of_one_prompt_do_not_narrow_the_interval():
    prompts = [str(index) for index in range(6)]
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    once, often = mean_interval(values, prompts), mean_interval(values * 5, prompts * 5)
    assert often == pytest.approx(once)
    apart = mean_interval(values * 5)
    assert apart.high - apart.low < 0.6 * (often.high - often.low)


def test_an_interval_needs_two_pairs_and_is_reproducible():
    assert mean_interval([]) is mean_interval([1.0]) is share_interval(1.0, 1) is None
    assert mean_interval([1.0, 2.0], ["a", "a"]) == (1.0, 2.0)  # one prompt: its seeds are resampled
    assert mean_interval([3.0, 1.0, 2.0]) == mean_interval([3.0, 1.0, 2.0])
    assert mean_interval([2.0] * 4) == (2.0, 2.0)


def test_a_ratio_weighs_pairs_by_their_denominators():
    low, high = ratio_interval([1.0, 50.0], [100.0, 100.0], ["a", "b"])
    assert (low, high) == pytest.approx((0.01, 0.5))


def test_a_share_of_all_or_none_has_an_interval_too():
    # Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion, 2001: Wilson for 8 of 8 and 0 of 8
    assert share_interval(1.0, 8) == pytest.approx((0.676, 1.0), abs=1e-3)
    assert share_interval(0.0, 8) == pytest.approx((0.0, 0.324), abs=1e-3)


def test_the_estimate_of_more_pairs_comes_true():
    assert more_groups(10.0, 8.0, 7.0, 5) == 0
    assert more_groups(10.0, 8.0, 9.0, 5) == 16  # half the width: four times the prompts, and one more
    assert more_groups(10.0, 8.0, 10.0, 5) is None
    more = more_groups_of_share(1.0, 0.9, 8)
    assert share_interval(1.0, 8 + more).low > 0.9 >= share_interval(1.0, 8 + more - 1).low
    assert more_groups_of_share(0.9, 0.9, 8) is None
