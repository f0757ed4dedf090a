"""A histogram that grows with its range, and the ranges read from it.

The bins are [k * 2**e, (k + 1) * 2**e) for whole k: anchored at zero and as wide as a power of two. Doubling the width
joins two bins, so counts stay exact when the range grows or histograms are merged; e follows from the largest value
alone.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.scheme import Range, Scheme, exact_scale
from .extremes import extremes

_SIDE = 8192  # bins on each side of zero: the largest value falls in the upper 4096, so a bin is at most 1/4096 of it
_CHUNK = 1 << 19  # values counted at once, in float64
_COARSE, _FINE = 64, 3  # candidates for the clip that shrink both ends, and finer sweeps of each end after them


class Histogram:
    """Counts of values in bins, and the extremes of the values."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._exponent = -(1 << 30)
        self._counts: NDArray[np.int64] = np.zeros(2 * _SIDE, dtype=np.int64)  # counts[k + _SIDE] is of bin k

    @classmethod
    def of(cls, x: Tensor) -> "Histogram":
        """The histogram of `x`. Raises ValueError when `x` is empty or holds values that are not finite."""
        made = cls()
        made.low, made.high = extremes(x)
        made._exponent = _exponent(max(-made.low, made.high))
        flat = x.detach().reshape(-1)
        total = torch.zeros(2 * _SIDE, dtype=torch.int64, device=x.device)
        for part in flat.split(_CHUNK):
            scaled = torch.ldexp(part.double(), torch.tensor(-made._exponent, device=x.device)).floor_()
            total += torch.bincount(scaled.long() + _SIDE, minlength=2 * _SIDE)
        made._counts = total.cpu().numpy()
        return made

    def merge(self, other: "Histogram") -> None:
        """Adds the counts of `other`, which is not changed."""
        exponent = max(self._exponent, other._exponent)
        self._counts = _widened(self._counts, exponent - self._exponent) + _widened(
            other._counts, exponent - other._exponent
        )
        self._exponent = exponent
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def bins(self) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
        """Counts and left edges of the bins that are not empty, from low to high, and the width of a bin."""
        if self.low > self.high:
            raise ValueError("saw no data")
        filled = np.nonzero(self._counts)[0]
        width = math.ldexp(1.0, self._exponent)
        return self._counts[filled], ((filled - _SIDE) * width).astype(np.float64), width

    def percentiles(self, percentile: float) -> Range:
        """The edges of the narrowest bins that leave out at most 100 - `percentile` per cent at each end."""
        counts, edges, width = self.bins()
        cut = math.floor(int(counts.sum()) * (100 - Fraction(repr(percentile))) / 100)
        low = edges[int(np.searchsorted(np.cumsum(counts), cut, side="right"))]
        high = edges[len(edges) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), cut, side="right"))] + width
        return Range(max(float(low), self.low), min(float(high), self.high))


def _exponent(largest: float) -> int:
    """The smallest e with `largest` < _SIDE * 2**e, at least -1000, so that float64 holds the width."""
    if largest == 0.0:
        return -1000
    return max(math.frexp(largest)[1] - (_SIDE.bit_length() - 1), -1000)


def _widened(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    if doublings == 0:
        return counts
    if doublings >= _SIDE.bit_length():  # bins -1 and 0 are all that is left
        made = np.zeros_like(counts)
        made[_SIDE - 1], made[_SIDE] = counts[:_SIDE].sum(), counts[_SIDE:].sum()
        return made
    step = 1 << doublings
    halves = counts.reshape(-1, step).sum(1)  # _SIDE is a multiple of step: no sum crosses zero
    made = np.zeros_like(counts)
    start = _SIDE - _SIDE // step
    made[start : start + len(halves)] = halves
    return made


def best_clip(histogram: Histogram, scheme: Scheme) -> Range:
    """The range with the smallest squared error over the histogram's bin centres.

    Candidates shrink both ends alike, then each end alone around the best; the extremes themselves are among them.
    """
    counts, edges, width = histogram.bins()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    centres = np.clip(edges + width / 2, low, high)
    best = Range(low, high)
    error = squared_error(counts, centres, best, scheme)
    steps = np.linspace(1.0 / _COARSE, 1.0, _COARSE).tolist()
    ranges = [Range(low * step, high * step) for step in steps]
    for sweep in range(2 * _FINE + 1):
        for each in ranges:
            tried = squared_error(counts, centres, each, scheme)
            if tried < error:
                best, error = each, tried
        around = [1.0 + part * 0.5 ** (sweep // 2 + 2) for part in np.linspace(-1.0, 1.0, 9).tolist()]
        if sweep % 2:
            ranges = [Range(best.low, min(best.high * step, high)) for step in around]
        else:
            ranges = [Range(max(best.low * step, low), best.high) for step in around]
    return best


def squared_error(counts: NDArray[np.int64], values: NDArray[np.float64], extent: Range, scheme: Scheme) -> float:
    """The squared error of quantizing `values`, each taken `counts` times, with the range `extent`."""
    scale = exact_scale(extent, scheme)
    if scale == 0.0:
        return float((counts * values**2).sum())
    zero_point = 0 if scheme.symmetric else scheme.qmin - round(extent.low / scale)
    q = scheme.nearest_(torch.from_numpy(values / scale + zero_point)).numpy()
    return float((counts * ((q - zero_point) * scale - values) ** 2).sum())
