"""Extracts patches of a convolution's padded input as rows (patches, in * kernel height * kernel width).

A convolution applies a linear layer to each of these rows. So the observers of a convolution gather their statistics
from the rows, like the observers of a linear layer. Only a sample of the patches is extracted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers.modules import Geometry
from ..replay.current_call import CurrentCall
from .extremes import channels_of
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
        return windows[image, :, position // width, position % width].flatten(1)


class PatchSurvey(Survey):
    """Gathers the statistics of one convolution's input from a random sample of its patches, as `Survey` does from the
    rows of a linear layer's input. The extremes are those of the sample, not of all patches."""

    def __init__(self, current: CurrentCall, name: str, conv: nn.Conv2d) -> None:
        super().__init__(current, name)
        self.patches = Patches.of(conv, _SURVEYED)
        self.key = self.patches
        self.tensors = 0

    def read(self, x: Tensor) -> SurveyReading:
        """Returns a sample of the patches of `x`, an input of the convolution, as rows, and the extremes of each column
        of these rows. Raises ValueError if the rows are empty or contain NaN or infinities."""
        rows = self.patches(x)
        return SurveyReading(channels_of(rows), rows, [])

    def add(self, reading: SurveyReading) -> None:
        super().add(reading)
        self.tensors += 1

    def merge(self, other: Survey) -> None:
        super().merge(other)
        assert isinstance(other, PatchSurvey)
        self.tensors += other.tensors

    def patches_for(self, most: int) -> Patches:
        """Returns an extractor of patches for this survey's convolution, for as many inputs as this survey observed:
        from each input it takes an equal share of `most` patches, but at least 64 if the input has so many."""
        return replace(self.patches, most=max(_SURVEYED, -(-most // max(1, self.tensors))))
