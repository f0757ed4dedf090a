"""Takes patches of a convolution's padded input as rows (patches, in * kernel height * kernel width) of a linear layer.

Everything observed of linears by their rows is observed of convolutions by their patches, of which a sample is taken.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers.modules import Geometry
from ..replay.current_call import CurrentCall
from .extremes import channels_of
from .survey import Survey, SurveyReading

_SURVEYED = 64  # patches that a survey takes of each tensor


@dataclass(frozen=True)
class Patches:
    """Takes at most `most` patches of an input (batch, in, height, width), drawn evenly and always the same."""

    kernel: tuple[int, int]
    geometry: Geometry
    most: int

    @classmethod
    def of(cls, conv: nn.Conv2d, most: int) -> "Patches":
        """The patches that the convolution `conv` is applied to."""
        return cls((conv.kernel_size[0], conv.kernel_size[1]), Geometry.of(conv), most)

    def __call__(self, x: Tensor) -> Tensor:
        """The patches of `x`, (patches, in * kernel height * kernel width), channels first as in a flattened weight."""
        padded = self.geometry.padded(x.detach() if x.ndim == 4 else x.detach()[None], 0.0)
        for axis, size, step, apart in zip(
            (2, 3), self.kernel, self.geometry.stride, self.geometry.dilation, strict=True
        ):
            padded = padded.unfold(axis, apart * (size - 1) + 1, step)
        windows = padded[..., :: self.geometry.dilation[0], :: self.geometry.dilation[1]]
        batch, _, height, width = windows.shape[:4]  # (batch, in, out height, out width, kernel height, kernel width)
        total = batch * height * width
        places = torch.arange(total)
        if total > self.most:
            places = torch.randperm(total, generator=torch.Generator().manual_seed(total))[: self.most].sort().values
        places = places.to(x.device)
        image, place = places // (height * width), places % (height * width)
        return windows[image, :, place // width, place % width].flatten(1)


class PatchSurvey(Survey):
    """The survey of one convolution's input by a sample of its patches, whose extremes are not those of all patches."""

    def __init__(self, current: CurrentCall, name: str, conv: nn.Conv2d) -> None:
        super().__init__(current, name)
        self.patches = Patches.of(conv, _SURVEYED)
        self.key = self.patches
        self.tensors = 0

    def read(self, x: Tensor) -> SurveyReading:
        """Reads of an input's patches what `survey.survey_of` reads of rows."""
        rows = self.patches(x)
        return SurveyReading(channels_of(rows), rows, [])

    def add(self, reading: SurveyReading) -> None:
        super().add(reading)
        self.tensors += 1

    def merge(self, other: Survey) -> None:
        super().merge(other)
        assert isinstance(other, PatchSurvey)
        self.tensors += other.tensors

    def taking(self, most: int) -> Patches:
        """Patches of the same convolution, `most` in all over about as many tensors as this survey observed."""
        return replace(self.patches, most=max(_SURVEYED, -(-most // max(1, self.tensors))))
