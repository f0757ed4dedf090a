"""Smallest and largest values of layer inputs, for the whole tensor and for each channel.

The range of a smoothed input follows from the extremes of its channels, because smoothing multiplies all values of a
channel by the same positive factor.
"""

import math
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


class Channels:
    """Gathers the extremes of each channel over many tensors. The result has the same bits for any order of the tensors
    and any division of them among ranks."""

    def __init__(self) -> None:
        self._total: ChannelReading | None = None

    def add(self, reading: ChannelReading) -> None:
        """Adds the extremes of one tensor, which `channels_of` returned as `reading`."""
        total = self._total or reading
        low, high = torch.minimum(total.low, reading.low), torch.maximum(total.high, reading.high)
        self._total = ChannelReading(low, high, reading.rows + (0 if self._total is None else total.rows))

    def merge(self, other: "Channels") -> None:
        """Adds the extremes of all tensors that were added to `other`."""
        if other._total is not None:
            self.add(other._total)

    @property
    def rows(self) -> int:
        """The number of rows of all added tensors."""
        return 0 if self._total is None else self._total.rows

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel over all added tensors, (channels,) float32. Raises ValueError if no
        tensor was added."""
        return self._readings().low

    @property
    def high(self) -> Tensor:
        """The largest value of each channel over all added tensors, (channels,) float32. Raises ValueError if no tensor
        was added."""
        return self._readings().high

    def range(self, transform: Transform | None = None) -> Range:
        """Returns the range from the smallest to the largest value of all added tensors, after `transform` if it is not
        None. Because only the extremes of each channel are known, `transform` must apply an increasing function to each
        channel separately, as smoothing does. Raises ValueError if no tensor was added."""
        low, high = transformed(transform, self.low), transformed(transform, self.high)
        return Range(float(low.min()), float(high.max()))

    def _readings(self) -> ChannelReading:
        if self._total is None:
            raise ValueError("no input was observed")
        return self._total


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
