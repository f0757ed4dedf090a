"""Smallest and largest values of layer inputs, for the whole tensor and for each channel.

The range of a smoothed input follows from the extremes of its channels, because smoothing multiplies all values of a
channel by the same positive factor.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Range
from ..layers.transforms import Transform, transformed
from ..native.kernels import kernels_for

FEW_PROMPTS = 16  # from so many prompts on, the extremes of one prompt are not kept apart from those of the others


class ChannelReading(NamedTuple):
    """Holds the extremes of one tensor (..., channels): `low` and `high`, float32 (channels,), are the smallest and the
    largest value of each channel; `rows` is the number of rows, the product of the other axes."""

    low: Tensor
    high: Tensor
    rows: int

    def merged(self, other: "ChannelReading") -> "ChannelReading":
        """Returns the extremes of both tensors."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return ChannelReading(low, high, self.rows + other.rows)


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
    """Gathers the extremes of each channel over many tensors. As long as these belong to fewer than 16 prompts, the
    extremes without any one prompt are known too. The result has the same bits for any order of the tensors and any
    division of them among ranks."""

    def __init__(self) -> None:
        self._by_prompt: dict[int | None, ChannelReading] = {}  # with too many prompts, only one entry, for all of them

    def add(self, reading: ChannelReading, prompt: int | None) -> None:
        """Adds the extremes of one tensor, which `channels_of` returned as `reading`. `prompt` is the number of the
        prompt that the tensor belongs to."""
        prompt = None if None in self._by_prompt else prompt
        former = self._by_prompt.get(prompt)
        known = self._by_prompt | {prompt: reading if former is None else former.merged(reading)}
        if len(known) > 1 and (None in known or len(known) == FEW_PROMPTS):
            known = {None: reduce(ChannelReading.merged, known.values())}
        self._by_prompt = known  # another dict, since copies of this object share it

    def merge(self, other: "Channels") -> None:
        """Adds the extremes of all tensors that were added to `other`."""
        for prompt, reading in other._by_prompt.items():
            self.add(reading, prompt)

    @property
    def rows(self) -> int:
        """The number of rows of all added tensors."""
        return sum(reading.rows for reading in self._by_prompt.values())

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

    def without(self, prompt: int) -> ChannelReading | None:
        """Returns the extremes over the tensors of all prompts but `prompt`; None if there are no others, or if there
        were too many prompts to keep them apart."""
        others = [reading for other, reading in self._by_prompt.items() if other not in (None, prompt)]
        return reduce(ChannelReading.merged, others) if others else None

    def _readings(self) -> ChannelReading:
        if not self._by_prompt:
            raise ValueError("no input was observed")
        return reduce(ChannelReading.merged, self._by_prompt.values())


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
