"""Sum and sum of squares of every token, such that they depend on the token alone.

A sum over the last axis of a contiguous tensor is taken row by row, each in an order that its length alone decides; so
it is the same however tokens lie in batches, and on however many threads. What is summed over tokens is then summed
exactly (exact.py).
"""

import weakref
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .exact import ExactSum

_CHUNK = 1 << 19  # elements that are held in float64 at a time
_ROW = 4096  # longer tokens are summed piece by piece: torch splits very long rows over threads
_PENDING = 1 << 13  # rows that wait to be added exactly


class Rows:
    """Per-row sums of one tensor; several layers that were given the same tensor share it."""

    __slots__ = ("__weakref__", "count", "folded", "sums")

    def __init__(self, x: Tensor) -> None:
        """`x` of any rank, not empty; its values are read now."""
        self.count = x.numel()
        self.sums = _row_sums(x.reshape(-1, x.shape[-1]))  # (2, rows)
        self.folded: tuple[list[weakref.ref[Rows]], Moments] | None = None


def _row_sums(x: Tensor) -> NDArray[np.float64]:
    parts = []
    step = max(1, _CHUNK // min(x.shape[1], _ROW))
    for first in range(0, x.shape[1], _ROW):
        for start in range(0, x.shape[0], step):
            y = x[start : start + step, first : first + _ROW].to(torch.float64, memory_format=torch.contiguous_format)
            sums = y.sum(-1)
            parts.append(torch.stack((sums, y.mul_(y).sum(-1))))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).cpu().numpy()


class Moments:
    """Count, sum and sum of squares of everything added, exact."""

    def __init__(self) -> None:
        self.count = 0
        self._sum, self._squares = ExactSum(), ExactSum()

    def add(self, rows: list[Rows]) -> None:
        """Adds the rows of some tensors."""
        self.count += sum(each.count for each in rows)
        sums = np.concatenate([each.sums for each in rows], 1)
        self._sum.add(sums[0])
        self._squares.add(sums[1])

    def merge(self, other: "Moments") -> None:
        """Adds what `other` holds."""
        self.count += other.count
        self._sum.merge(other._sum)
        self._squares.merge(other._squares)

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the population, each rounded once."""
        mean = self._sum.value() / self.count
        variance = self._squares.value() / self.count - mean * mean
        return float(mean), float(max(variance, Fraction(0))) ** 0.5


class PendingMoments:
    """Moments that take rows in cheaply: they wait until there are enough to add at once."""

    def __init__(self) -> None:
        self._moments = Moments()
        self._rows: list[Rows] = []
        self._waiting = 0

    def add(self, rows: Rows) -> None:
        """Takes the rows of one tensor."""
        self._rows.append(rows)
        self._waiting += rows.sums.shape[1]
        if self._waiting >= _PENDING:
            self._settle()

    def merge(self, other: "PendingMoments") -> None:
        """Adds what `other` holds."""
        self._moments.merge(other.settled())

    def settled(self) -> Moments:
        """The moments of all that was added."""
        self._settle()
        return self._moments

    def _settle(self) -> None:
        if self._rows:
            self._moments.merge(_folded(self._rows))
            self._rows, self._waiting = [], 0


def _folded(rows: list[Rows]) -> Moments:
    """The moments of `rows`. Layers that share their inputs ask for the same rows one after the other: the last of the
    rows remembers the answer."""
    known = rows[-1].folded
    if known is not None and [ref() for ref in known[0]] == rows:  # Rows are equal when they are the same
        return known[1]
    made = Moments()
    made.add(rows)
    rows[-1].folded = ([weakref.ref(each) for each in rows], made)
    return made
