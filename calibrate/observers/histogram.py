"""A histogram that grows with the range of its values, and the ranges computed from the histogram.

The bins are [k * 2**e, (k + 1) * 2**e) for whole numbers k: zero is an edge, and the width is a power of two. When the
range grows or histograms are merged, pairs of bins are joined, which doubles the width and keeps the counts exact. The
largest absolute value alone determines e, so the histogram does not depend on the order of the values.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.scheme import Range, Scheme, exact_scale
from .extremes import extremes

_SIDE = 8192  # bins on each side of zero; the largest value is in the upper 4096, so a bin is at most 1/4096 of it
_CHUNK = 1 << 19  # values counted together, in float64
_COARSE, _FINE = 64, 3  # candidates that shrink both ends alike; later sweeps over each end, each finer


class Histogram:
    """Counts how many values lie in each bin; `low` and `high` are the smallest and the largest of the counted
    values."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._exponent = -(1 << 30)
        self._counts: NDArray[np.int64] = np.zeros(2 * _SIDE, dtype=np.int64)  # counts[k + _SIDE] is the count of bin k

    @classmethod
    def of(cls, x: Tensor) -> "Histogram":
        """Returns the histogram of `x`. Raises ValueError if `x` is empty or contains NaN or infinities."""
        histogram = cls()
        histogram.low, histogram.high = extremes(x)
        histogram._exponent = _exponent(max(-histogram.low, histogram.high))
        flat = x.detach().reshape(-1)
        total = torch.zeros(2 * _SIDE, dtype=torch.int64, device=x.device)
        for part in flat.split(_CHUNK):
            scaled = torch.ldexp(part.double(), torch.tensor(-histogram._exponent, device=x.device)).floor_()
            total += torch.bincount(scaled.long() + _SIDE, minlength=2 * _SIDE)
        histogram._counts = total.cpu().numpy()
        return histogram

    def merge(self, other: "Histogram") -> None:
        """Adds the counts and the extremes of `other`, which is not changed."""
        exponent = max(self._exponent, other._exponent)
        self._counts = _join_bins(self._counts, exponent - self._exponent) + _join_bins(
            other._counts, exponent - other._exponent
        )
        self._exponent = exponent
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def bins(self) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
        """Returns the counts and the left edges of the bins that are not empty, in ascending order, and the width of a
        bin. Raises ValueError if the histogram has no values."""
        if self.low > self.high:
            raise ValueError("no input was observed")
        filled = np.nonzero(self._counts)[0]
        width = math.ldexp(1.0, self._exponent)
        return self._counts[filled], ((filled - _SIDE) * width).astype(np.float64), width

    def percentiles(self, percentile: float) -> Range:
        """Returns the narrowest range that has edges of bins as its ends and leaves out at most 100 - `percentile` per
        cent of the values at each end. If this range extends beyond the smallest or the largest value, it is cut there.
        Raises ValueError if the histogram has no values."""
        counts, edges, width = self.bins()
        cut = math.floor(int(counts.sum()) * (100 - Fraction(repr(percentile))) / 100)
        low = edges[int(np.searchsorted(np.cumsum(counts), cut, side="right"))]
        high = edges[len(edges) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), cut, side="right"))] + width
        return Range(max(float(low), self.low), min(float(high), self.high))


def _exponent(largest: float) -> int:
    """Returns the exponent e of the bin width 2**e for values of which the largest absolute value is `largest`: the
    smallest e with _SIDE * 2**e > `largest`, because there are _SIDE bins on each side of zero. Returns at least -1000,
    so that the width is a float64 number."""
    if largest == 0.0:
        return -1000
    return max(math.frexp(largest)[1] - (_SIDE.bit_length() - 1), -1000)


def _join_bins(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """Returns the counts after the width of the bins was doubled `doublings` times, so that 2**doublings neighbours
    become one bin. `counts` has all bins in ascending order, as many below zero as above. The result has the same
    length, with zeros at both ends."""
    if doublings == 0:
        return counts
    if doublings >= _SIDE.bit_length():  # only bins -1 and 0 remain
        joined = np.zeros_like(counts)
        joined[_SIDE - 1], joined[_SIDE] = counts[:_SIDE].sum(), counts[_SIDE:].sum()
        return joined
    step = 1 << doublings
    halves = counts.reshape(-1, step).sum(1)  # _SIDE is a multiple of step, so no sum crosses zero
    joined = np.zeros_like(counts)
    start = _SIDE - _SIDE // step
    joined[start : start + len(halves)] = halves
    return joined


def best_clip(histogram: Histogram, scheme: Scheme) -> Range:
    """Returns the range with which codes represent the values in `histogram` with the smallest squared error. `scheme`
    is the rule by which values become codes. Each value counts as the centre of its bin.

    First tries the range from the smallest to the largest value, extended to include 0, and 63 smaller ranges: this
    range with both ends multiplied by one factor below 1. Then, from the best range so far, changes one end at a time.
    """
    counts, edges, width = histogram.bins()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    centres = np.clip(edges + width / 2, low, high)
    best = Range(low, high)
    error = squared_error(counts, centres, best, scheme)
    steps = np.linspace(1.0 / _COARSE, 1.0, _COARSE).tolist()
    ranges = [Range(low * step, high * step) for step in steps]
    for sweep in range(2 * _FINE + 1):
        for candidate in ranges:
            candidate_error = squared_error(counts, centres, candidate, scheme)
            if candidate_error < error:
                best, error = candidate, candidate_error
        around = [1.0 + part * 0.5 ** (sweep // 2 + 2) for part in np.linspace(-1.0, 1.0, 9).tolist()]
        if sweep % 2:
            ranges = [Range(best.low, min(best.high * step, high)) for step in around]
        else:
            ranges = [Range(max(best.low * step, low), best.high) for step in around]
    return best


def squared_error(counts: NDArray[np.int64], values: NDArray[np.float64], extent: Range, scheme: Scheme) -> float:
    """Returns the sum of the squared errors of `values` when codes represent them. The codes follow from the range
    `extent` by the rule `scheme`. `counts` has for each value how often it occurs."""
    scale = exact_scale(extent, scheme)
    if scale == 0.0:
        return float((counts * values**2).sum())
    zero_point = 0 if scheme.symmetric else scheme.qmin - round(extent.low / scale)
    q = scheme.nearest_(torch.from_numpy(values / scale + zero_point)).numpy()
    return float((counts * ((q - zero_point) * scale - values) ** 2).sum())
