"""Extremes of inputs, as a whole and of each channel. The range of an input multiplied channel by channel follows from
the latter."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Range
from ..layers.transforms import Transform, transformed


class ChannelReading(NamedTuple):
    """The smallest and largest value of each channel of one tensor (..., channels): float32, (channels,)."""

    low: Tensor
    high: Tensor
    rows: int


def channels_of(x: Tensor) -> ChannelReading:
    """Reads the extremes of each channel of `x`. Raises ValueError when `x` is empty or holds values not finite."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.numel() == 0:
        raise ValueError("no values")
    low, high = rows.amin(0).to(torch.float32), rows.amax(0).to(torch.float32)
    if not (math.isfinite(low.amin()) and math.isfinite(high.amax())):
        raise ValueError(f"{rows.numel() - int(rows.isfinite().sum())} non-finite values")
    return ChannelReading(low, high, len(rows))


class Channels:
    """The extremes of each channel over many tensors: the same bits for any split and any order of the calls."""

    def __init__(self) -> None:
        self._known: ChannelReading | None = None

    def add(self, reading: ChannelReading) -> None:
        """Adds a reading."""
        known = self._known or reading
        low, high = torch.minimum(known.low, reading.low), torch.maximum(known.high, reading.high)
        self._known = ChannelReading(low, high, reading.rows + (0 if self._known is None else known.rows))

    def merge(self, other: "Channels") -> None:
        """Adds all readings of `other`."""
        if other._known is not None:
            self.add(other._known)

    @property
    def rows(self) -> int:
        """The number of rows read."""
        return 0 if self._known is None else self._known.rows

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel, (channels,) float32. Raises ValueError without readings, as `high` and
        `range` do."""
        return self._seen().low

    @property
    def high(self) -> Tensor:
        """The largest value of each channel, (channels,) float32."""
        return self._seen().high

    def range(self, transform: Transform | None = None) -> Range:
        """The range of all values after a transform of each channel by itself."""
        low, high = transformed(transform, self.low), transformed(transform, self.high)
        return Range(float(low.min()), float(high.max()))

    def _seen(self) -> ChannelReading:
        if self._known is None:
            raise ValueError("saw no data")
        return self._known


class Extremes(NamedTuple):
    """Smallest and largest value of a tensor."""

    low: float
    high: float


def extremes(x: Tensor) -> Extremes:
    """Smallest and largest value of `x`. Raises ValueError when `x` is empty or holds values that are not finite."""
    if x.numel() == 0:
        raise ValueError("no values")
    x = x.detach()
    # aminmax of a slice takes up to three times as long as both ends alone; of a contiguous tensor it is one pass
    ends = torch.aminmax(x) if x.is_contiguous() else (torch.amin(x), torch.amax(x))
    low, high = (end.item() for end in ends)
    if not (low - low == 0.0 and high - high == 0.0):  # NaN and infinities come through
        raise ValueError(f"{int((~x.isfinite()).sum())} of {x.numel()} values not finite")
    return Extremes(low + 0.0, high + 0.0)  # never -0.0, which would depend on the order
