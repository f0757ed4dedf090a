"""A sample of the rows of a layer's input that does not depend on the order in which they come."""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 512  # rows of a sample; it is halved when there are more


class Kept(NamedTuple):
    """Rows of one tensor. `place`: the position of the call, and of the tensor among those it gave the layer."""

    place: tuple[int, int]
    depth: int
    rows: Tensor
    level: float | None


def depth_of(place: tuple[int, int]) -> int:
    """0 for half of all places, 1 for a quarter, ... in any regular sequence of them, each spread evenly over it.

    Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, 1973, section 6.4) of the position; the tensors
    of a call are as far apart as multiples of the square root of 2.
    """
    return 64 - ((place[0] * 0x9E3779B97F4A7C15 + place[1] * 0x6A09E667F3BCC909) % 2**64).bit_length()


class Sample:
    """Rows spread over what it was given, at most `_MOST` of them, and their noise levels.

    When there are more, the places of the smallest depth go. So what it holds follows from what there was, and not from
    the order it came in or which rank heard it.
    """

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._depth = 0

    def add(self, rows: Tensor, level: float | None, place: tuple[int, int]) -> None:
        """Takes in rows (rows, channels)."""
        depth = depth_of(place)
        if depth >= self._depth:
            self._kept.append(Kept(place, depth, rows, level))
            if sum(len(each.rows) for each in self._kept) > _MOST:
                self.thin([self.sizes()])

    def sizes(self) -> Counter[int]:
        """How many rows it holds of each depth."""
        sizes: Counter[int] = Counter()
        for each in self._kept:
            sizes[each.depth] += len(each.rows)
        return sizes

    def thin(self, sizes: Iterable[Counter[int]]) -> None:
        """Lets go what would be too much with what there is elsewhere: `sizes` of all samples to be merged."""
        total = sum(sizes, Counter[int]())
        while sum(count for depth, count in total.items() if depth >= self._depth) > _MOST:
            self._depth += 1
        self._kept = [each for each in self._kept if each.depth >= self._depth]

    def merge(self, other: "Sample") -> None:
        """Takes in all that `other` holds, both thinned together before."""
        self._depth = max(self._depth, other._depth)
        self._kept = sorted(self._kept + other._kept, key=lambda each: each.place)

    def copy(self) -> "Sample":
        """What it holds now."""
        made = copy.copy(self)
        made._kept = list(self._kept)
        return made

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def rows(self) -> Tensor:
        """(rows, channels)."""
        return torch.cat([each.rows for each in self._kept])

    @property
    def levels(self) -> Tensor | None:
        """(rows,) float32; None where a call has no noise level."""
        if any(each.level is None for each in self._kept):
            return None
        return torch.cat([torch.full((len(each.rows),), float(each.level or 0.0)) for each in self._kept])
