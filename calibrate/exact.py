"""Sums of float64 numbers without any rounding: the order and the grouping of the numbers do not show in them.

The mantissas are summed as integers, one sum for each exponent: a superaccumulator (Kulisch, Computer Arithmetic and
Validity, 2008). Two sums are merged by adding those integers.
"""

from collections import Counter
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_MANTISSA = 53
_SPLIT = 26
_BATCH = 1 << 24  # numbers whose half mantissas, below 2**27, float64 sums without rounding


class ExactSum:
    """The sum of all finite float64 numbers given to `add`, as integers of units of 2**exponent."""

    def __init__(self) -> None:
        self._units: Counter[int] = Counter()

    def add(self, values: NDArray[np.float64]) -> None:
        """Adds every number of a 1-d array."""
        for start in range(0, len(values), _BATCH):
            self._add(values[start : start + _BATCH])

    def _add(self, values: NDArray[np.float64]) -> None:
        fraction, exponent = np.frexp(values)
        mantissa = np.ldexp(fraction, _MANTISSA).astype(np.int64)
        high = mantissa >> _SPLIT  # rounds down, so that the low half is never negative
        low = mantissa & ((1 << _SPLIT) - 1)
        lowest = int(exponent.min())
        bins = exponent - lowest
        for half, shift in ((high, _SPLIT), (low, 0)):
            for at, total in enumerate(np.bincount(bins, weights=half.astype(np.float64))):
                if total:
                    self._units[lowest + at - _MANTISSA + shift] += int(total)

    def merge(self, other: "ExactSum") -> None:
        """Adds what `other` holds, which stays as it is."""
        for exponent, units in other._units.items():
            self._units[exponent] += units

    def value(self) -> Fraction:
        """The sum."""
        lowest = min(self._units, default=0)
        total = sum(units << (exponent - lowest) for exponent, units in self._units.items())
        return Fraction(total) * Fraction(2) ** lowest
