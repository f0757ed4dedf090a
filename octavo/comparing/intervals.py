"""Estimates how far a measure would be off with other prompts and seeds: 95 % confidence intervals, and how many more
pairs of pictures would settle whether the measure meets a limit."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from octavo.calibrate.replay.sqnr import student

_RESAMPLES = 4000  # the 2.5 % quantile then has a standard error of 10 % of its rank (square root of 100 of 4000)
_SEED = 0  # the same pairs give the same interval
_Z = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """Holds the bounds of a 95 % confidence interval."""

    low: float
    high: float


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str]
) -> Interval | None:
    """Returns the 95 % confidence interval of sum(numerators) / sum(denominators), or None for fewer than two pairs.

    Each pair of pictures has a numerator and a denominator, and belongs to a group: its prompt. If all denominators are
    1, the ratio is the mean of the numerators. Pairs of one prompt with several seeds are no independent samples, so
    whole groups are resampled (bootstrap: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979; of clusters:
    Cameron, Gelbach and Miller, Bootstrap-Based Improvements for Inference with Clustered Errors, 2008). If all pairs
    have the same prompt, pairs are resampled. The interval then says nothing about other prompts.

    With few groups, the 2.5 % and 97.5 % quantiles of the bootstrap give an interval that is too narrow. So quantiles
    further out are taken; for a normally distributed mean they would give the interval of Student's t (expanded
    percentile interval: Hesterberg, What Teachers Should Know About the Bootstrap, 2015). With two or three groups the
    interval is still too narrow, because it cannot reach beyond the smallest and the largest ratio of a group.
    """
    names = list(dict.fromkeys(groups))
    rows = [names.index(group) for group in groups] if len(names) > 1 else list(range(len(groups)))
    count = max(rows, default=-1) + 1
    if count < 2:
        return None
    sums = [np.bincount(rows, np.asarray(values, float), count) for values in (numerators, denominators)]
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    ratios = (drawn @ sums[0]) / np.maximum(drawn @ sums[1], np.finfo(float).tiny)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(low), float(high))


def share_interval(share: float, groups: int) -> Interval | None:
    """Returns the 95 % confidence interval of a share, such as that of the pictures that show their prompt, or None for
    fewer than two groups.

    `share` is 0 to 1. Each of the `groups` prompts counts as one trial, however many seeds it has, because whether a
    picture is right depends on the prompt above all. The interval is the score interval (Wilson, Probable Inference,
    the Law of Succession, and Statistical Inference, 1927). A bootstrap interval would have no width if all trials
    agree.
    """
    if groups < 2:
        return None
    weight = _Z**2 / groups
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / groups + weight / (4 * groups))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def more_groups(value: float, bound: float, limit: float, groups: int) -> int | None:
    """Estimates how many more prompts would make a confidence interval so narrow that `limit` lies outside it. Returns
    0 if `limit` lies outside it now, and None if the estimate is equal to `limit`.

    `value` is the estimate, `bound` that bound of the interval which lies on the same side of the estimate as `limit`,
    and `groups` the number of prompts so far. The width of an interval falls as 1 / sqrt(groups).
    """
    half, distance = abs(bound - value), abs(limit - value)
    if half < distance:
        return 0
    return math.floor(groups * (half / distance) ** 2) + 1 - groups if distance > 0 else None


def more_groups_of_share(share: float, limit: float, groups: int) -> int | None:
    """Estimates how many more prompts would make the confidence interval of a share (`share_interval`) so narrow that
    `limit` lies outside it. `share` and `limit` are 0 to 1, and `groups` is the number of prompts so far. Returns None
    if 10 000 prompts would not be enough."""
    for count in range(max(groups, 2), 10_000):
        bounds = share_interval(share, count)
        if bounds is None or not bounds.low <= limit <= bounds.high:
            return count - groups
    return None
