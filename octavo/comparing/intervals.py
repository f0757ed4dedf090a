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

    Each pair of pictures has a numerator and a denominator (1 for each pair gives a mean), and belongs to a group: its
    prompt. Pairs of one prompt with several seeds are no independent sample, so whole groups are resampled (bootstrap:
    Efron, Bootstrap Methods: Another Look at the Jackknife, 1979; of clusters: Cameron, Gelbach and Miller,
    Bootstrap-Based Improvements for Inference with Clustered Errors, 2008). If all pairs have the same prompt, pairs
    are resampled: the interval then says nothing about other prompts.

    The quantiles of a bootstrap of few groups lie too close together. They are moved outwards, to those at which a
    normal distribution would give the interval of Student's t (expanded percentile interval: Hesterberg, What Teachers
    Should Know About the Bootstrap, 2015). With two or three groups the interval is still too narrow: it cannot leave
    the values of the groups.
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
    """Returns the 95 % confidence interval of a share, such as that of the pictures that show their prompt, or None
    for fewer than two groups.

    `share` is 0 to 1. Each of the `groups` prompts counts as one trial, however many seeds it has, because whether a
    picture is right depends on the prompt above all. A bootstrap has no width where all trials agree; the score
    interval has (Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927).
    """
    if groups < 2:
        return None
    weight = _Z**2 / groups
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / groups + weight / (4 * groups))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def more_groups(value: float, bound: float, limit: float, groups: int) -> int | None:
    """Estimates how many more prompts would narrow an interval until it leaves `limit` out; 0 if it does already.

    `value` is the estimate, `bound` the interval's bound on the limit's side, and `groups` the number of prompts so
    far. The width of an interval falls as 1 / sqrt(groups). Returns None if the estimate is the limit itself.
    """
    half, distance = abs(bound - value), abs(limit - value)
    if half < distance:
        return 0
    return math.floor(groups * (half / distance) ** 2) + 1 - groups if distance > 0 else None


def more_groups_of_share(share: float, limit: float, groups: int) -> int | None:
    """Estimates the same as `more_groups` for a share, whose `share_interval` narrows faster near 0 and 1. Returns None
    if more than 10 000 would be needed."""
    for count in range(max(groups, 2), 10_000):
        bounds = share_interval(share, count)
        if bounds is None or not bounds.low <= limit <= bounds.high:
            return count - groups
    return None
