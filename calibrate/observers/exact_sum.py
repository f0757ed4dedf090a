"""Sums of floating-point numbers without any rounding, independent of the order and grouping of the numbers.

The mantissas are summed as integers, with one sum for each exponent: a superaccumulator (Kulisch, Computer Arithmetic
and Validity, 2008). Two sums are merged by adding these integers.
"""

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..native.kernels import library

_SPLIT = 26  # bits of the low half of a float64 mantissa; the two halves are summed separately
_BATCH = 1 << 24  # numbers summed together: 2**24 half mantissas, each below 2**27, have an exact sum in float64


class ExactSum:
    """Sums finite float32 and float64 numbers exactly, as integer multiples of powers of two, in any order."""

    def __init__(self) -> None:
        self._units: Counter[int] = Counter()

    def add(self, values: NDArray[np.floating]) -> None:
        """Adds every number of `values`, a 1-d array of finite numbers. float64 numbers are summed by the compiled
        kernels, or by numpy if there are no kernels; float32 numbers are always summed by numpy."""
        kernels = library() if values.dtype == np.float64 else None
        if kernels is not None:
            for exponent, units in kernels.exact_units(np.ascontiguousarray(values)).items():
                self._units[exponent] += units
            return
        bits = np.finfo(values.dtype).nmant + 1
        for start in range(0, len(values), _BATCH):
            fraction, exponent = np.frexp(values[start : start + _BATCH])
            mantissa = np.ldexp(fraction, bits)
            if bits <= _SPLIT:
                self._add(mantissa, exponent, -bits)
            else:
                integers = mantissa.astype(np.int64)
                self._add(integers >> _SPLIT, exponent, _SPLIT - bits)  # rounds down: the low half is never negative
                self._add(integers & ((1 << _SPLIT) - 1), exponent, -bits)

    def _add(self, mantissa: NDArray[Any], exponent: NDArray[np.intc], shift: int) -> None:
        lowest = int(exponent.min())
        for index, total in enumerate(np.bincount(exponent - lowest, mantissa).tolist()):
            if total:
                self._units[lowest + index + shift] += int(total)

    def merge(self, other: "ExactSum") -> None:
        """Adds all numbers that were added to `other`, which is not changed."""
        for exponent, units in other._units.items():
            self._units[exponent] += units

    def value(self) -> Fraction:
        """Returns the sum as an exact fraction."""
        lowest = min(self._units, default=0)
        total = sum(units << (exponent - lowest) for exponent, units in self._units.items())
        return Fraction(total) * Fraction(2) ** lowest
