"""A sample of the rows of a layer's input that does not depend on the order in which the rows are added."""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 512  # most rows of a sample: above it, the rows of the smallest depth, about half, are dropped


class SampledRows(NamedTuple):
    """Holds rows of one tensor. `source` is the position of the call, and the index of the tensor among the layer's
    inputs in that call. `depth` decides when the rows are dropped: a sample that becomes too large drops the rows of
    the smallest depth first. `level` is the noise level of the call; None where it has none."""

    source: tuple[int, int]
    depth: int
    rows: Tensor
    level: float | None


def depth_of(source: tuple[int, int]) -> int:
    """Returns the depth of a tensor's rows: a sample that becomes too large drops the rows of the smallest depth first.
    `source` is the position of the call, and the index of the tensor among the layer's inputs in that call.

    The depth is the number of leading zero bits of a 64-bit hash of `source`. So half of all sources have depth 0, a
    quarter have depth 1, and so on. Within calls that are a fixed number of positions apart, such as every third call,
    the calls of each depth are spaced evenly, because the position is hashed by multiplication with the golden ratio
    (Fibonacci hashing: Knuth, The Art of Computer Programming, volume 3, 1973, section 6.4). The index, multiplied by
    the square root of 2, is added to the hash.
    """
    return 64 - ((source[0] * 0x9E3779B97F4A7C15 + source[1] * 0x6A09E667F3BCC909) % 2**64).bit_length()


class Sample:
    """A sample of at most 512 rows, spaced evenly over all added rows, with their noise levels.

    The rows of one tensor have a depth, which follows from the tensor's position among the calls. Half of all tensors
    have depth 0, a quarter depth 1, and so on, and the tensors of each depth are spaced evenly over the calls. As long
    as there are more than 512 rows, the rows of the smallest depth are dropped. So the sample depends only on the added
    rows, not on their order or on which rank observed them.
    """

    def __init__(self) -> None:
        self._kept: list[SampledRows] = []
        self._depth = 0

    def add(self, rows: Tensor, level: float | None, source: tuple[int, int]) -> None:
        """Adds `rows` (rows, channels) of one tensor, observed at the noise level `level`. `source` is the position of
        the call, and the index of the tensor among the layer's inputs in that call."""
        depth = depth_of(source)
        if depth >= self._depth:
            self._kept.append(SampledRows(source, depth, rows, level))
            if sum(len(entry.rows) for entry in self._kept) > _MOST:
                self.thin([self.sizes()])

    def sizes(self) -> Counter[int]:
        """Returns how many of the sampled rows have each depth, the number that decides which rows `thin` drops first:
        a dict from depth to number of rows."""
        sizes: Counter[int] = Counter()
        for entry in self._kept:
            sizes[entry.depth] += len(entry.rows)
        return sizes

    def thin(self, sizes: Iterable[Counter[int]]) -> None:
        """Drops the rows of the smallest depths, so that several samples, once merged, have at most 512 rows in all.
        `sizes` has the result of `Sample.sizes` for each of these samples, this one included."""
        total = sum(sizes, Counter[int]())
        while sum(count for depth, count in total.items() if depth >= self._depth) > _MOST:
            self._depth += 1
        self._kept = [entry for entry in self._kept if entry.depth >= self._depth]

    def merge(self, other: "Sample") -> None:
        """Adds all rows of `other`. `thin` must have been called on both samples before, with the sizes of all samples
        to merge."""
        self._depth = max(self._depth, other._depth)
        self._kept = sorted(self._kept + other._kept, key=lambda entry: entry.source)

    def copy(self) -> "Sample":
        """Returns a copy of the sample as it is now; both share the tensors of rows."""
        sample = copy.copy(self)
        sample._kept = list(self._kept)
        return sample

    def by_call(self) -> list[tuple[int, Tensor]]:
        """Returns the position of a call, and the sampled rows, of each tensor."""
        return [(entry.source[0], entry.rows) for entry in self._kept]

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def rows(self) -> Tensor:
        """The sampled rows, (rows, channels)."""
        return torch.cat([entry.rows for entry in self._kept])

    @property
    def levels(self) -> Tensor | None:
        """The noise level of each row, (rows,) float32; None if any of the rows comes from a call without a noise
        level."""
        if any(entry.level is None for entry in self._kept):
            return None
        return torch.cat([torch.full((len(entry.rows),), float(entry.level or 0.0)) for entry in self._kept])
