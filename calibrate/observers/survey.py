"""Gathers statistics of a layer's input during a replay, a run of the float model on the recorded calls.

A choice that was made from inputs, such as smoothing factors, is judged on the rows of other, held-out calls. So a
choice cannot win by fitting only the calls that it was made from. Every fourth prompt is held out, or every fourth call
where calls do not name their prompt.
"""

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..replay.current_call import CurrentCall, prompt_of
from .extremes import ChannelReading, Channels, channels_of
from .row_sample import Sample

_ROWS = 8  # most rows that a survey samples from each tensor
_FEW = 8  # rows for each sample of a batch: inputs with at most so many are those of modulations, not tokens


class SurveyReading(NamedTuple):
    """Holds the extremes of each channel and some rows of one tensor, an input of one or several layers. Each of these
    layers has a Survey object. `surveys` lists the Survey objects to which this reading was added so far. Each of them
    notes the name of the list's first survey, so that layers with the same input are known by the same name. The `rows`
    of a convolution's input are patches; `peaks` (patches, channels) then has, for each patch, the largest absolute
    value of each channel in the patch's whole image."""

    channels: ChannelReading
    rows: Tensor  # (rows, channels), in the tensor's dtype
    surveys: list["Survey"]
    peaks: Tensor | None = None


def survey_of(x: Tensor) -> SurveyReading:
    """Returns the extremes of each channel of `x` (..., channels), and at most 8 of its rows, spaced evenly. Raises
    ValueError if `x` is empty or contains NaN or infinities."""
    channels = channels_of(x)
    return SurveyReading(channels, x.detach()[_row_indices(x.shape[:-1], x.device)], [])


@lru_cache(64)
def _row_indices(shape: torch.Size, device: torch.device) -> tuple[Tensor | None, ...]:
    """Returns the indices of at most 8 rows, spaced evenly, of a tensor with the shape (*shape, channels): one index
    tensor on `device` for each axis of `shape`. Indexing by them copies only these rows. A reshape to (rows, channels)
    would copy the whole tensor if it is a slice of another."""
    if not shape:
        return (None,)  # the tensor is a single row
    rows = shape.numel()
    count = min(_ROWS, rows)
    index = torch.arange(count, device=device) * rows // max(count, 1)
    return torch.unravel_index(index, shape)


class Survey:
    """Gathers the extremes of each channel and a sample of rows of the input of the layer `name`, separately for
    held-out calls and for the other calls. The attributes `held_out` and `train` hold the extremes of these two kinds
    of calls.

    A replay calls `add` for each input of the layer. `current` says whether the call that is running is held out.
    """

    read = staticmethod(survey_of)
    taps = 1  # columns that each channel has in a sampled row: height times width of the kernel of a convolution
    groups = 1  # groups of a convolution

    def __init__(self, current: CurrentCall, name: str) -> None:
        self._current, self.name = current, name
        self.train, self.held_out = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self._leaders: set[str] = set()
        self._source = (-1, 0)

    def add(self, reading: SurveyReading) -> None:
        held_out, position = self._current.held_out, self._current.position
        self._source = (position, self._source[1] + 1 if self._source[0] == position else 0)
        (self.held_out if held_out else self.train).add(reading.channels, self._prompt_at(position))
        (self._held_rows if held_out else self._train_rows).add(reading.rows, self._current.level, self._source)
        reading.surveys.append(self)
        self._leaders.add(reading.surveys[0].name)

    def copy(self, current: CurrentCall) -> "Survey":
        """Returns a copy of the survey as it is now, with `current`, a copy of the original's CurrentCall, to say which
        call is running. The two surveys share their tensors; no method writes to these tensors."""
        survey = copy.copy(self)
        survey._current = current
        survey.train, survey.held_out = copy.copy(self.train), copy.copy(self.held_out)
        survey._train_rows, survey._held_rows = self._train_rows.copy(), self._held_rows.copy()
        survey._leaders = set(self._leaders)
        return survey

    @property
    def row_samples(self) -> tuple[Sample, Sample]:
        """Two samples of the input's rows: that from the calls that are not held out, and that from the held-out
        calls."""
        return self._train_rows, self._held_rows

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples of the survey, those of rows first."""
        return self.row_samples

    def merge(self, other: "Survey") -> None:
        """Adds everything that `other` observed. Before, `Sample.thin` must have been called on the samples of both
        surveys, so that the merged samples are not too large."""
        self.train.merge(other.train)
        self.held_out.merge(other.held_out)
        for mine, theirs in zip(self.samples, other.samples, strict=True):
            mine.merge(theirs)
        self._leaders |= other._leaders

    @property
    def has_input(self) -> bool:
        """True if the layer received any input."""
        return self.train.rows + self.held_out.rows > 0

    @property
    def has_held_out(self) -> bool:
        """True if the layer had inputs both in held-out calls and in calls that are not held out."""
        return self.train.rows > 0 and self.held_out.rows > 0

    @property
    def all(self) -> Channels:
        """The extremes of each input channel over all calls, held out or not."""
        merged = Channels()
        merged.merge(self.train)
        merged.merge(self.held_out)
        return merged

    @property
    def fit_channels(self) -> Channels:
        """The extremes of each input channel, for making choices such as smoothing factors: over the calls that are not
        held out. If the layer had no input in held-out calls, or none in other calls, the extremes are those over all
        calls."""
        return self.train if self.has_held_out else self.all

    @property
    def fit_sample(self) -> Sample:
        """The sample of input rows for making choices, such as the scale of the input: from the calls that are not held
        out, or from the held-out calls if there are no others. Raises ValueError if the layer had no input."""
        if not self.has_input:
            raise ValueError("no input was observed")
        return self._train_rows or self._held_rows

    def rows_by_prompt(self, *, fit: bool) -> dict[int, Tensor]:
        """Returns the sampled rows of each prompt, a dict from the number of the prompt: those of `fit_sample`, or with
        `fit` False, those of all calls. The number of a call that does not name its prompt is its position."""
        parts: dict[int, list[Tensor]] = {}
        for sample in (self.fit_sample,) if fit else self.row_samples:
            for position, rows in sample.by_call():
                parts.setdefault(self._prompt_at(position), []).append(rows)
        return {prompt: torch.cat(rows) for prompt, rows in parts.items()}

    def _prompt_at(self, position: int) -> int:
        return prompt_of(self._current.units[position], position)

    @property
    def judge_sample(self) -> Sample:
        """The sample of input rows for judging choices, such as smoothing factors: from the held-out calls, or from the
        other calls if none are held out. Raises ValueError if the layer had no input."""
        if not self.has_input:
            raise ValueError("no input was observed")
        return self._held_rows or self._train_rows

    @property
    def judge_peaks(self) -> Tensor | None:
        """For each row of `judge_sample`, a patch of a convolution's input: the largest absolute value of each channel
        of the patch's whole image, (rows, channels), from which a dynamic scale follows. None for a linear layer, whose
        rows have scales of their own."""
        return None

    @property
    def columns(self) -> int:
        """The number of columns of a sampled row. Raises ValueError if the layer had no input."""
        return len(self.all.low) * self.taps

    @property
    def leader(self) -> str:
        """The name that stands for all layers with the same input: the first of the layers that received the same
        tensors in every call. A layer that shares its input with no other has its own name."""
        return next(iter(self._leaders)) if len(self._leaders) == 1 else self.name

    @property
    def has_tokens(self) -> bool:
        """True if the input has, on average, more than eight rows for each sample of a batch, because so many rows are
        tokens. An input with fewer rows has one or a few vectors for each sample, such as a time embedding."""
        return self.train.rows + self.held_out.rows > _FEW * self._current.samples
