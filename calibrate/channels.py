"""Statistics of each channel of an input, from which the range of the input divided channel by channel follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .scheme import Range


class ChannelReading(NamedTuple):
    """What is kept of one tensor (..., channels): smallest, largest and summed squared value of each channel."""

    low: Tensor  # (channels,) float32
    high: Tensor
    squares: Tensor  # (channels,) float32
    rows: int


def channels_of(x: Tensor) -> ChannelReading:
    """Reads a tensor. Raises ValueError when it is empty or holds values that are not finite."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.numel() == 0:
        raise ValueError("no values")
    low, high = rows.amin(0).to(torch.float32), rows.amax(0).to(torch.float32)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(f"{rows.numel() - int(rows.isfinite().sum())} non-finite values")
    return ChannelReading(low, high, rows.to(torch.float32).square().sum(0), len(rows))


class Channels:
    """The extremes of each channel, and its mean square. An observer (observers.py) whose range is that of all.

    Extremes are the same bits however calls are split; mean squares are float64 sums of float32 ones.
    """

    read: Callable[[Tensor], Any] = staticmethod(channels_of)

    def __init__(self, options: Any = None) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._squares: Tensor | None = None
        self.rows = 0

    def add(self, reading: ChannelReading) -> None:
        if self._low is None or self._high is None or self._squares is None:
            self._low, self._high = reading.low.clone(), reading.high.clone()
            self._squares = reading.squares.to(torch.float64)
        else:
            torch.minimum(self._low, reading.low, out=self._low)
            torch.maximum(self._high, reading.high, out=self._high)
            self._squares += reading.squares
        self.rows += reading.rows

    def merge(self, other: "Channels") -> None:
        if other._low is not None and other._high is not None and other._squares is not None:
            self.add(ChannelReading(other._low, other._high, other._squares, other.rows))  # type: ignore[arg-type]

    @property
    def low(self) -> Tensor:
        """(channels,) float32. Raises ValueError when nothing was taken in, as `high`, `mean_square` and `range` do."""
        return _seen(self._low)

    @property
    def high(self) -> Tensor:
        return _seen(self._high)

    @property
    def mean_square(self) -> Tensor:
        """(channels,) float64."""
        return _seen(self._squares) / self.rows

    def range(self, multiplier: Tensor | None = None) -> Range:
        """The range of all values, each channel multiplied by its `multiplier` (channels,), positive."""
        low, high = self.low, self.high
        if multiplier is not None:
            low, high = low * multiplier, high * multiplier
        return Range(float(low.min()), float(high.max()))


def _seen(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("saw no data")
    return tensor
