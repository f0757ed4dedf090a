"""Extracts patches of a convolution's padded input as rows (patches, in * kernel height * kernel width).

A convolution applies a linear layer to each of these rows. So the observers of a convolution gather their statistics
from the rows, like the observers of a linear layer. Only a sample of the patches is extracted.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers.modules import Geometry
from ..replay.current_call import CurrentCall
from .extremes import channels_of_images
from .row_sample import Sample
from .survey import Survey, SurveyReading

_SURVEYED = 64  # most patches that a survey samples from each tensor


@dataclass(frozen=True)
class Patches:
    """Extracts at most `most` patches of an input (batch, in, height, width): a uniform random sample. Inputs with
    equal numbers of patches are sampled at the same positions. `kernel` is the height and width of a patch; `geometry`
    has the stride, padding and dilation."""

    kernel: tuple[int, int]
    geometry: Geometry
    most: int

    @classmethod
    def of(cls, conv: nn.Conv2d, most: int) -> "Patches":
        """Returns a `Patches` object that extracts, from each input of `conv`, at most `most` of the patches that
        `conv` multiplies with its weight."""
        return cls((conv.kernel_size[0], conv.kernel_size[1]), Geometry.of(conv), most)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns patches of `x`, (patches, in * kernel height * kernel width). The columns have the order of
        `weight.flatten(1)`, where `weight` is the convolution's weight."""
        return self.sampled(x)[0]

    def sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns patches of `x`, (patches, in * kernel height * kernel width), and for each patch the index of its
        image in the batch, (patches,). If `x` has more than `most` patches, they are a random sample, the same for the
        same number of patches."""
        padded = self.geometry.padded(x.detach() if x.ndim == 4 else x.detach()[None], 0.0)
        for axis, size, step, dilation in zip(
            (2, 3), self.kernel, self.geometry.stride, self.geometry.dilation, strict=True
        ):
            padded = padded.unfold(axis, dilation * (size - 1) + 1, step)
        windows = padded[..., :: self.geometry.dilation[0], :: self.geometry.dilation[1]]
        batch, _, height, width = windows.shape[:4]  # (batch, in, out height, out width, kernel height, kernel width)
        total = batch * height * width
        indices = torch.arange(total)
        if total > self.most:
            indices = torch.randperm(total, generator=torch.Generator().manual_seed(total))[: self.most].sort().values
        indices = indices.to(x.device)
        image, position = indices // (height * width), indices % (height * width)
        return windows[image, :, position // width, position % width].flatten(1), image


class PatchSurvey(Survey):
    """Gathers the extremes of each channel of one convolution's input, and a random sample of its patches, as `Survey`
    does of the rows of a linear layer's input."""

    def __init__(self, current: CurrentCall, name: str, conv: nn.Conv2d) -> None:
        super().__init__(current, name)
        self.patches = Patches.of(conv, _SURVEYED)
        self.taps, self.groups = math.prod(self.patches.kernel), conv.groups
        self.key = self.patches
        self.tensors = 0
        self._train_peaks, self._held_peaks = Sample(), Sample()  # a row for each row of the samples of patches

    def read(self, x: Tensor) -> SurveyReading:
        """Returns the extremes of each channel of `x`, an input of the convolution, and a sample of its patches. Raises
        ValueError if `x` is empty or contains NaN or infinities."""
        channels = channels_of_images(x)
        rows, image = self.patches.sampled(x)
        peaks = x.detach().abs().amax((-2, -1)).view(-1, x.shape[-3])[image]
        return SurveyReading(channels, rows, [], peaks)

    def add(self, reading: SurveyReading) -> None:
        assert reading.peaks is not None
        super().add(reading)
        peaks = self._held_peaks if self._current.held_out else self._train_peaks
        peaks.add(reading.peaks, self._current.level, self._source)
        self.tensors += 1

    def copy(self, current: CurrentCall) -> "PatchSurvey":
        survey = super().copy(current)
        assert isinstance(survey, PatchSurvey)
        survey._train_peaks, survey._held_peaks = self._train_peaks.copy(), self._held_peaks.copy()
        return survey

    @property
    def samples(self) -> tuple[Sample, ...]:
        return *super().samples, self._train_peaks, self._held_peaks

    @property
    def judge_peaks(self) -> Tensor:
        return (self._held_peaks or self._train_peaks).rows

    def merge(self, other: Survey) -> None:
        super().merge(other)
        assert isinstance(other, PatchSurvey)
        self.tensors += other.tensors

    def patches_for(self, most: int) -> Patches:
        """Returns an extractor of patches for this survey's convolution, for as many inputs as this survey observed:
        from each input it takes an equal share of `most` patches, but at least 64 if the input has so many."""
        return replace(self.patches, most=max(_SURVEYED, -(-most // max(1, self.tensors))))
