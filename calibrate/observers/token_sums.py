"""Sum and sum of squares of every token (a row of a tensor), computed so that both sums depend on this token alone.

The compiled kernels (native/statistics.c) sum a row in float64 in a fixed order, in the pass that also finds the
extremes. Without kernels, and for tensors on other devices or in float64, torch computes the sums, and the last digits
of a token's sums may differ from those of the kernels.

torch sums the last axis of a contiguous tensor row by row, and the order of a row's additions depends only on the row's
length. So the sum of a token is the same for any batching of tokens and any number of threads. The sums of tokens are
then added exactly (exact_sum.py).

torch sums a token in float32, which takes a third of the time of float64, if the token's values vary so much around
their mean that the variance computed from both sums has 6 correct digits. All other tokens are summed in float64. The
choice of the dtype depends on the token alone.
"""

import weakref
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..native.kernels import kernels_for
from .exact_sum import ExactSum
from .extremes import Extremes, extremes

_MIN_VARIANCE = 0.05  # lowest ratio of a token's variance to its mean square at which float32 is used
_SMALLEST, _LARGEST = 1e-12, 1e17  # bounds on float32 norms whose squares neither vanish nor overflow
_ROW = 4096  # most values of a row summed together: torch splits very long rows over threads
_SMALL = 1 << 13  # most values of a tensor that is summed together with others
_PENDING = 1 << 13  # rows that wait, at which all waiting rows are added exactly
_COPIED = 1 << 16  # values in copies of small tensors, at which all waiting rows are added exactly

FloatArray = NDArray[np.floating]


class RowSums(NamedTuple):
    """Holds the sum and the sum of squares of each row, all in float32 or all in float64."""

    sums: FloatArray
    squares: FloatArray


class TokenSums:
    """The sum and the sum of squares of each row of one tensor, shared by the layers that received the tensor.

    If there are no compiled kernels, torch sums the rows. torch takes as long for a tensor of one row as for a hundred
    rows, so a small tensor is copied and summed later, together with others.
    """

    __slots__ = ("__weakref__", "cache", "copy", "count", "rows", "sums")

    def __init__(self, x: Tensor, sums: RowSums | None = None) -> None:
        """Reads the values of `x`, a tensor with any number of axes that is not empty. `sums` has the sums of the rows
        if they are known already; None: they are computed here or later."""
        self.count = x.numel()
        self.cache: tuple[list[weakref.ref[TokenSums]], Moments] | None = None
        self.copy: Tensor | None = None
        if sums is not None:
            self.sums, self.rows = [sums], len(sums.sums)
            return
        x = x.reshape(-1, x.shape[-1])
        self.rows = x.shape[0] * -(-x.shape[1] // _ROW)
        self.copy = x.clone() if self.count <= _SMALL else None
        self.sums = _row_sums(x) if self.copy is None else []


def read_tokens(x: Tensor) -> tuple[Extremes, TokenSums]:
    """Returns the smallest and the largest value of `x`, and the sums of its tokens. The compiled kernels, where there
    are any, read `x` once for both. Raises ValueError if `x` is empty or contains NaN or infinities."""
    if (kernels := kernels_for(x)) and (statistics := kernels.row_statistics(x)) is not None:
        low, high, sums, squares = statistics
        return Extremes(low, high), TokenSums(x, RowSums(sums, squares))
    x = x.detach()
    return extremes(x), TokenSums(x)


def _row_sums(x: Tensor) -> list[RowSums]:
    """Cuts the rows of `x` (rows, channels) into pieces of at most 4096 values (_ROW), because torch splits longer rows
    over threads. Returns the sum and the sum of squares of each piece, in one or several RowSums, in no particular
    order."""
    return [piece for first in range(0, x.shape[1], _ROW) for piece in _sum_rows(x[:, first : first + _ROW])]


def row_sums_of(rows: list[TokenSums]) -> list[RowSums]:
    """Returns the sums and the sums of squares of the rows of several tensors, in a list of RowSums objects. The order
    of the rows, and their division among the objects, are arbitrary; exact totals over all rows do not depend on
    them."""
    tensors_by_width: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for entry in rows:
        if entry.copy is not None:
            tensors_by_width.setdefault((entry.copy.shape[1], entry.copy.dtype), []).append(entry.copy)
    small = [piece for tensors in tensors_by_width.values() for piece in _row_sums(torch.cat(tensors))]
    return [*(piece for entry in rows for piece in entry.sums), *small]


def _sum_rows(x: Tensor) -> list[RowSums]:
    """Returns the sums and sums of squares of the rows of `x`: in float32 for rows where float32 is precise enough, in
    float64 for the others."""
    x = (x if x.dtype == torch.float64 else x.to(torch.float32)).contiguous()
    sums, norms = x.sum(-1).cpu().numpy(), torch.linalg.vector_norm(x, dim=-1).cpu().numpy()
    bound = ((1 - _MIN_VARIANCE) * x.shape[1]) ** 0.5  # |sum| / norm of a token with the lowest such variance
    margin = bound * norms
    margin -= np.abs(sums)
    if margin.min() > _SMALLEST and norms.max() < _LARGEST:
        return [RowSums(sums, norms * norms)]
    imprecise = np.flatnonzero(~((margin > _SMALLEST) & (norms < _LARGEST)))
    y = x[torch.from_numpy(imprecise).to(x.device)].to(torch.float64)
    sums64 = y.sum(-1).cpu().numpy()
    sums, norms = np.delete(sums, imprecise), np.delete(norms, imprecise)
    return [RowSums(sums, norms * norms), RowSums(sums64, y.mul_(y).sum(-1).cpu().numpy())]


class Moments:
    """Keeps the exact count, sum and sum of squares of all added values."""

    def __init__(self) -> None:
        self.count = 0
        self._sum, self._squares = ExactSum(), ExactSum()

    def add(self, rows: list[TokenSums]) -> None:
        """Adds all values of several tensors. `rows` has one TokenSums for each tensor: the sums of its rows."""
        self.count += sum(entry.count for entry in rows)
        pieces = [piece for piece in row_sums_of(rows) if len(piece.sums)]
        for dtype in (np.float32, np.float64):
            selected = [piece for piece in pieces if piece.sums.dtype == dtype]
            if selected:
                self._sum.add(np.concatenate([piece.sums for piece in selected]))
                self._squares.add(np.concatenate([piece.squares for piece in selected]))

    def merge(self, other: "Moments") -> None:
        """Adds all values that were added to `other`."""
        self.count += other.count
        self._sum.merge(other._sum)
        self._squares.merge(other._squares)

    def mean_and_std(self) -> tuple[float, float]:
        """Returns the mean and the population standard deviation of all added values, computed from their exact
        sums."""
        mean = self._sum.value() / self.count
        variance = self._squares.value() / self.count - mean * mean
        return float(mean), float(max(variance, Fraction(0))) ** 0.5


class BatchedMoments:
    """Sums all values and their squares exactly, as `Moments` does, but collects the sums of rows and adds many of them
    at a time, which is faster."""

    def __init__(self) -> None:
        self._moments = Moments()
        self._rows: list[TokenSums] = []
        self._waiting = self._copied = 0

    def add(self, rows: TokenSums) -> None:
        """Adds all values of one tensor. `rows` has the sums of its rows."""
        self._rows.append(rows)
        self._waiting += rows.rows
        self._copied += rows.count if rows.copy is not None else 0
        if self._waiting >= _PENDING or self._copied >= _COPIED:
            self._add_waiting()

    def merge(self, other: "BatchedMoments") -> None:
        """Adds all values that were added to `other`."""
        self._moments.merge(other.moments())

    def moments(self) -> Moments:
        """Returns the number, the sum and the sum of squares of all added values."""
        self._add_waiting()
        return self._moments

    def __getstate__(self) -> dict[str, Any]:
        self._add_waiting()  # waiting rows hold weak references to each other, which cannot be pickled
        return self.__dict__

    def _add_waiting(self) -> None:
        if self._rows:
            self._moments.merge(_moments_of(self._rows))
            self._rows, self._waiting, self._copied = [], 0, 0


def _moments_of(rows: list[TokenSums]) -> Moments:
    """Returns the count, the sum and the sum of squares of all values of `rows`.

    Layers with the same inputs call this function one after another with the same TokenSums objects. So the result is
    stored in the attribute `cache` of the last object, and is returned again if the next list has the same objects.
    """
    cached = rows[-1].cache
    if cached is not None and [ref() for ref in cached[0]] == rows:  # TokenSums compare by identity
        return cached[1]
    moments = Moments()
    moments.add(rows)
    rows[-1].cache = ([weakref.ref(entry) for entry in rows], moments)
    return moments
