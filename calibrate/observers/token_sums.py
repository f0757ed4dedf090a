"""Sum and sum of squares of every token, computed so that both depend on the token alone.

torch sums the last axis of a contiguous tensor row by row, each row in an order that its length alone decides; so the
sum is the same for any batching of tokens and any number of threads. The sums of tokens are then added exactly
(exact_sum.py).

Within a token float32 suffices, and takes a third of the time, where the token's values vary enough around their mean:
the two sums then keep 6 digits of the variance. Other tokens are summed in float64. The token alone decides which.
"""

import weakref
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .exact_sum import ExactSum

_SPREAD = 0.05  # ratio of a token's variance to its mean square from which float32 is used
_SMALLEST, _LARGEST = 1e-12, 1e17  # norms in float32 whose squared terms neither vanish nor overflow
_ROW = 4096  # longer tokens are summed piece by piece: torch splits very long rows over threads
_SMALL = 1 << 13  # elements of a tensor that is summed together with others
_PENDING = 1 << 13  # most rows that wait to be added exactly
_HELD = 1 << 16  # most elements of small tensors that wait to be summed

Numbers = NDArray[np.floating]


class Piece(NamedTuple):
    """Sums and sums of squares of rows, all in float32 or all in float64."""

    sums: Numbers
    squares: Numbers


class Rows:
    """Per-row sums of one tensor, shared by the layers that received the tensor.

    A small tensor is copied and summed later, with others: one row of a modulation takes as long as a hundred.
    """

    __slots__ = ("__weakref__", "count", "folded", "held", "pieces", "rows")

    def __init__(self, x: Tensor) -> None:
        """Reads the values of `x`, a tensor of any rank that is not empty."""
        self.count = x.numel()
        x = x.reshape(-1, x.shape[-1])
        self.rows = x.shape[0] * -(-x.shape[1] // _ROW)
        self.held = x.clone() if self.count <= _SMALL else None
        self.pieces = _pieces(x) if self.held is None else []
        self.folded: tuple[list[weakref.ref[Rows]], Moments] | None = None


def _pieces(x: Tensor) -> list[Piece]:
    return [piece for first in range(0, x.shape[1], _ROW) for piece in _summed(x[:, first : first + _ROW])]


def pieces_of(rows: list[Rows]) -> list[Piece]:
    """The sums of all rows; their grouping and order do not change an exact sum over them."""
    held: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for each in rows:
        if each.held is not None:
            held.setdefault((each.held.shape[1], each.held.dtype), []).append(each.held)
    small = [piece for tensors in held.values() for piece in _pieces(torch.cat(tensors))]
    return [*(piece for each in rows for piece in each.pieces), *small]


def _summed(x: Tensor) -> list[Piece]:
    x = (x if x.dtype == torch.float64 else x.to(torch.float32)).contiguous()
    sums, norms = x.sum(-1).cpu().numpy(), torch.linalg.vector_norm(x, dim=-1).cpu().numpy()
    most = ((1 - _SPREAD) * x.shape[1]) ** 0.5  # |sum| / norm of a token whose variance is just enough
    margin = most * norms
    margin -= np.abs(sums)
    if margin.min() > _SMALLEST and norms.max() < _LARGEST:
        return [Piece(sums, norms * norms)]
    unsafe = np.flatnonzero(~((margin > _SMALLEST) & (norms < _LARGEST)))
    y = x[torch.from_numpy(unsafe).to(x.device)].to(torch.float64)
    wide = y.sum(-1).cpu().numpy()
    sums, norms = np.delete(sums, unsafe), np.delete(norms, unsafe)
    return [Piece(sums, norms * norms), Piece(wide, y.mul_(y).sum(-1).cpu().numpy())]


class Moments:
    """The exact count, sum and sum of squares of all added values."""

    def __init__(self) -> None:
        self.count = 0
        self._sum, self._squares = ExactSum(), ExactSum()

    def add(self, rows: list[Rows]) -> None:
        """Adds the rows of some tensors."""
        self.count += sum(each.count for each in rows)
        pieces = [piece for piece in pieces_of(rows) if len(piece.sums)]
        for dtype in (np.float32, np.float64):
            same = [piece for piece in pieces if piece.sums.dtype == dtype]
            if same:
                self._sum.add(np.concatenate([piece.sums for piece in same]))
                self._squares.add(np.concatenate([piece.squares for piece in same]))

    def merge(self, other: "Moments") -> None:
        """Adds the values of `other`."""
        self.count += other.count
        self._sum.merge(other._sum)
        self._squares.merge(other._squares)

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of the population, each rounded once."""
        mean = self._sum.value() / self.count
        variance = self._squares.value() / self.count - mean * mean
        return float(mean), float(max(variance, Fraction(0))) ** 0.5


class PendingMoments:
    """Moments to which rows are added cheaply: rows wait until there are enough to add at once."""

    def __init__(self) -> None:
        self._moments = Moments()
        self._rows: list[Rows] = []
        self._waiting = self._held = 0

    def add(self, rows: Rows) -> None:
        """Adds the rows of one tensor."""
        self._rows.append(rows)
        self._waiting += rows.rows
        self._held += rows.count if rows.held is not None else 0
        if self._waiting >= _PENDING or self._held >= _HELD:
            self._settle()

    def merge(self, other: "PendingMoments") -> None:
        """Adds the rows of `other`."""
        self._moments.merge(other.settled())

    def settled(self) -> Moments:
        """The moments of all added rows."""
        self._settle()
        return self._moments

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # waiting rows hold weak references to each other, which cannot be pickled
        return self.__dict__

    def _settle(self) -> None:
        if self._rows:
            self._moments.merge(_folded(self._rows))
            self._rows, self._waiting, self._held = [], 0, 0


def _folded(rows: list[Rows]) -> Moments:
    """The moments of `rows`. Layers that share their inputs ask for the same rows one after the other, so the last of
    the rows keeps the answer."""
    known = rows[-1].folded
    if known is not None and [ref() for ref in known[0]] == rows:  # Rows are equal when they are the same
        return known[1]
    made = Moments()
    made.add(rows)
    rows[-1].folded = ([weakref.ref(each) for each in rows], made)
    return made
