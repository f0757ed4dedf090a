"""Sum and sum of squares of every token, such that they depend on the token alone.

A sum over the last axis of a contiguous tensor is taken row by row, each in an order that its length alone decides; so
it is the same however tokens lie in batches, and on however many threads. What is summed over tokens is then summed
exactly (exact.py).

Within a token float32 is enough, and a third of the time, where the token's values spread around its mean: the two sums
then keep 6 digits of its variance. Other tokens are summed in float64. Which of the two it is, the token alone decides.
"""

import weakref
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .exact import ExactSum

_SPREAD = 0.05  # of the mean square, that the variance of a token has to be for float32
_SMALLEST, _LARGEST = 1e-25, 1e35  # sums of squares whose float32 terms neither vanish nor overflow
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
    pieces = [_piece_sums(x[:, first : first + _ROW]) for first in range(0, x.shape[1], _ROW)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)


def _piece_sums(x: Tensor) -> NDArray[np.float64]:
    x = (x if x.dtype == torch.float64 else x.to(torch.float32)).contiguous()
    made = torch.stack((x.sum(-1), torch.linalg.vector_norm(x, dim=-1))).cpu().numpy().astype(np.float64)
    made[1] *= made[1]
    sums, squares = made
    spread = squares - sums * sums / x.shape[1]
    unsafe = np.flatnonzero(~((spread > _SPREAD * squares) & (squares > _SMALLEST) & (squares < _LARGEST)))
    if len(unsafe):
        y = x[torch.from_numpy(unsafe).to(x.device)].to(torch.float64)
        made[0, unsafe] = y.sum(-1).cpu().numpy()
        made[1, unsafe] = y.mul_(y).sum(-1).cpu().numpy()
    return made


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
