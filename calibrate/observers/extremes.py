"""Smallest and largest values of layer inputs, for the whole tensor and for each channel.

The range of a smoothed input follows from the extremes of its channels, because smoothing multiplies all values of a
channel by the same positive factor.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Range
from ..layers.transforms import Transform, transformed
from ..native.kernels import kernels_for


class ChannelReading(NamedTuple):
    """Holds the extremes of one tensor (..., channels): `low` and `high`, float32 (channels,), are the smallest and the
    largest value of each channel; `rows` is the number of rows, the product of the other axes."""

    low: Tensor
    high: Tensor
    rows: int


def channels_of(x: Tensor) -> ChannelReading:
    """Returns the smallest and the largest value of each channel of `x` (..., channels), and the number of its rows.
    The compiled kernels, where there are any, read `x` once and give the same bits as torch. Raises ValueError if `x`
    is empty or contains NaN or infinities."""
    if (kernels := kernels_for(x)) and (ends := kernels.column_extremes(x)) is not None:
        return ChannelReading(ends[0], ends[1], x.numel() // x.shape[-1])
    return _channels_along(x.detach().reshape(-1, x.shape[-1]), -1)


def channels_of_images(x: Tensor) -> ChannelReading:
    """Returns the smallest and the largest value of each channel of `x` ([batch,] channels, height, width), and the
    number of its positions, over all images. Raises ValueError if `x` is empty or contains NaN or infinities."""
    return _channels_along(x.detach(), -3)


def _channels_along(x: Tensor, axis: int) -> ChannelReading:
    if x.numel() == 0:
        raise ValueError("no values")
    others = [other for other in range(-x.ndim, 0) if other != axis]
    low, high = (end.to(torch.float32) + 0.0 for end in (x.amin(others), x.amax(others)))  # turns -0.0 into 0.0
    if not (math.isfinite(low.amin()) and math.isfinite(high.amax())):
        raise ValueError(f"{x.numel() - int(x.isfinite().sum())} non-finite values")
    return ChannelReading(low, high, x.numel() // x.shape[axis])


class Peaks(NamedTuple):
    """For each channel, the largest values of two prompts. `largest` is the largest value of all, `prompt` the number
    of the prompt that has it, and `second` the largest value of all other prompts; minus infinity if there are none.
    Each is (channels,), `prompt` int32, the others float32."""

    largest: Tensor
    prompt: Tensor
    second: Tensor

    @classmethod
    def of(cls, largest: Tensor, prompt: int) -> "Peaks":
        """Returns the peaks of tensors of a single prompt, of which `largest` has the largest value of each channel."""
        return cls(largest, torch.full_like(largest, prompt, dtype=torch.int32), torch.full_like(largest, -math.inf))

    def merged(self, other: "Peaks") -> "Peaks":
        """Returns the peaks of the tensors of both; the prompts of the tensors may be the same."""
        later = other.largest > self.largest
        second = torch.where(
            self.prompt == other.prompt,
            torch.maximum(self.second, other.second),
            torch.maximum(torch.minimum(self.largest, other.largest), torch.where(later, other.second, self.second)),
        )
        prompt = torch.where(later, other.prompt, self.prompt)
        return Peaks(torch.maximum(self.largest, other.largest), prompt, second)

    def without(self, prompts: Sequence[int]) -> Tensor:
        """Returns for each of `prompts` the largest value of each channel in all other prompts, (prompts, channels);
        minus infinity if there are none."""
        left_out = torch.tensor(prompts, dtype=torch.int32, device=self.prompt.device)[:, None]
        return torch.where(self.prompt == left_out, self.second, self.largest)


class Channels:
    """Gathers the extremes of each channel over many tensors, so that those of all prompts but one are known too. The
    result has the same bits for any order of the tensors and any division of them among ranks."""

    def __init__(self) -> None:
        self._peaks: tuple[Peaks, Peaks] | None = None  # of the values, and of the values times -1
        self._rows = 0
        self._latest: tuple[ChannelReading, int] | None = None  # what is not in `_peaks` yet, and its prompt

    def add(self, reading: ChannelReading, prompt: int) -> None:
        """Adds the extremes of one tensor, which `channels_of` returned as `reading`. `prompt` is the number of the
        prompt that the tensor belongs to."""
        self._rows += reading.rows
        if self._latest is not None and self._latest[1] == prompt:
            latest = self._latest[0]
            low, high = torch.minimum(latest.low, reading.low), torch.maximum(latest.high, reading.high)
            reading = ChannelReading(low, high, reading.rows)
        else:
            self._add_latest()
        self._latest = reading, prompt

    def merge(self, other: "Channels") -> None:
        """Adds the extremes of all tensors that were added to `other`."""
        self._add_latest()
        other._add_latest()
        self._rows += other._rows
        self._add_peaks(other._peaks)

    def _add_latest(self) -> None:
        if self._latest is not None:
            (low, high, _), prompt = self._latest
            self._latest = None
            self._add_peaks((Peaks.of(high, prompt), Peaks.of(low.neg(), prompt)))

    def _add_peaks(self, peaks: tuple[Peaks, Peaks] | None) -> None:
        if self._peaks is not None and peaks is not None:
            peaks = self._peaks[0].merged(peaks[0]), self._peaks[1].merged(peaks[1])
        self._peaks = peaks or self._peaks

    @property
    def rows(self) -> int:
        """The number of rows of all added tensors."""
        return self._rows

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel over all added tensors, (channels,) float32. Raises ValueError if no
        tensor was added."""
        return self._gathered()[1].largest.neg() + 0.0  # turns -0.0 into 0.0

    @property
    def high(self) -> Tensor:
        """The largest value of each channel over all added tensors, (channels,) float32. Raises ValueError if no tensor
        was added."""
        return self._gathered()[0].largest

    def range(self, transform: Transform | None = None) -> Range:
        """Returns the range from the smallest to the largest value of all added tensors, after `transform` if it is not
        None. Because only the extremes of each channel are known, `transform` must apply an increasing function to each
        channel separately, as smoothing does. Raises ValueError if no tensor was added."""
        low, high = transformed(transform, self.low), transformed(transform, self.high)
        return Range(float(low.min()), float(high.max()))

    def without(self, prompts: Sequence[int]) -> ChannelReading:
        """Returns for each of `prompts` the extremes over the tensors of all other prompts, (prompts, channels), with 0
        as the number of rows. If there are no other prompts, `low` is infinite and `high` minus infinite."""
        high, low = (peaks.without(prompts) for peaks in self._gathered())
        return ChannelReading(low.neg() + 0.0, high, 0)

    def _gathered(self) -> tuple[Peaks, Peaks]:
        self._add_latest()
        if self._peaks is None:
            raise ValueError("no input was observed")
        return self._peaks


class Extremes(NamedTuple):
    """Holds the smallest and the largest value of a tensor."""

    low: float
    high: float


def extremes(x: Tensor) -> Extremes:
    """Returns the smallest and the largest value of `x`. The compiled kernels, where there are any, give the same bits
    as torch. Raises ValueError if `x` is empty or contains NaN or infinities."""
    if (kernels := kernels_for(x)) and (ends := kernels.extremes(x)) is not None:
        return Extremes(*ends)
    return _torch_extremes(x)


def _torch_extremes(x: Tensor) -> Extremes:
    if x.numel() == 0:
        raise ValueError("no values")
    x = x.detach()
    # aminmax takes one pass over a contiguous tensor; on a slice it takes up to three times as long as amin and amax
    ends = torch.aminmax(x) if x.is_contiguous() else (torch.amin(x), torch.amax(x))
    low, high = (end.item() for end in ends)
    if not (low - low == 0.0 and high - high == 0.0):  # a NaN or infinity in `x` is one of the ends
        raise ValueError(f"{int((~x.isfinite()).sum())} of {x.numel()} values are not finite")
    return Extremes(low + 0.0, high + 0.0)  # turns -0.0 into 0.0: which of them is found depends on the order
