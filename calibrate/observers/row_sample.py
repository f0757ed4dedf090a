"""A sample of the rows of a layer's input that does not depend on the order of the rows."""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 512  # rows of a sample; with more, the sample is halved


class Kept(NamedTuple):
    """Sampled rows of one tensor. `place`: the position of the call, and of the tensor among the layer's inputs in that
    call."""

    place: tuple[int, int]
    depth: int
    rows: Tensor
    level: float | None


def depth_of(place: tuple[int, int]) -> int:
    """The depth of a place: 0 for half of all places, 1 for a quarter, ..., spaced evenly over any regular sequence.

    Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, 1973, section 6.4) of the position; the tensors
    of a call are as far apart as multiples of the square root of 2.
    """
    return 64 - ((place[0] * 0x9E3779B97F4A7C15 + place[1] * 0x6A09E667F3BCC909) % 2**64).bit_length()


class Sample:
    """At most `_MOST` rows, spaced evenly over all added rows, and their noise levels.

    With more rows, the places of the smallest depth are dropped. So the sample follows from the rows alone, and not
    from their order or from which rank observed them.
    """

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._depth = 0

    def add(self, rows: Tensor, level: float | None, place: tuple[int, int]) -> None:
        """Adds rows (rows, channels) of the tensor at `place`."""
        depth = depth_of(place)
        if depth >= self._depth:
            self._kept.append(Kept(place, depth, rows, level))
            if sum(len(each.rows) for each in self._kept) > _MOST:
                self.thin([self.sizes()])

    def sizes(self) -> Counter[int]:
        """The number of rows of each depth in the sample."""
        sizes: Counter[int] = Counter()
        for each in self._kept:
            sizes[each.depth] += len(each.rows)
        return sizes

    def thin(self, sizes: Iterable[Counter[int]]) -> None:
        """Drops the rows that would be too many after a merge; `sizes` are those of all samples to be merged."""
        total = sum(sizes, Counter[int]())
        while sum(count for depth, count in total.items() if depth >= self._depth) > _MOST:
            self._depth += 1
        self._kept = [each for each in self._kept if each.depth >= self._depth]

    def merge(self, other: "Sample") -> None:
        """Adds all rows of `other`; both were thinned together before."""
        self._depth = max(self._depth, other._depth)
        self._kept = sorted(self._kept + other._kept, key=lambda each: each.place)

    def copy(self) -> "Sample":
        """A copy of the sample as it is now; the rows are shared."""
        made = copy.copy(self)
        made._kept = list(self._kept)
        return made

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def rows(self) -> Tensor:
        """The sampled rows, (rows, channels)."""
        return torch.cat([each.rows for each in self._kept])

    @property
    def levels(self) -> Tensor | None:
        """The noise level of each row, (rows,) float32; None where a call has no noise level."""
        if any(each.level is None for each in self._kept):
            return None
        return torch.cat([torch.full((len(each.rows),), float(each.level or 0.0)) for each in self._kept])
