"""The survey of a layer's input during one replay: statistics of channels and samples of rows, with a held-out split.

A choice that was made from inputs is judged on the rows of other, held-out calls. So a choice cannot win by fitting
only the calls that it was made from. Every fourth prompt is held out, or every fourth call where calls do not name
their prompt.
"""

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..replay.current_call import CurrentCall
from .extremes import ChannelReading, Channels, channels_of
from .row_sample import Sample

_ROWS = 8  # most rows that a survey samples from each tensor
_FEW = 8  # rows for each sample of a batch: inputs with at most so many are those of modulations, not tokens


class SurveyReading(NamedTuple):
    """The statistics and sampled rows of one tensor; `surveys` lists the surveys that observed the tensor."""

    channels: ChannelReading
    rows: Tensor  # (rows, channels), in the tensor's dtype
    surveys: list["Survey"]


def survey_of(x: Tensor) -> SurveyReading:
    """Reads the statistics and a sample of rows of a tensor (..., channels). Raises ValueError if `x` is empty or
    contains NaN or infinities."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return SurveyReading(channels_of(x), rows[_row_indices(len(rows), x.device)], [])


@lru_cache(64)
def _row_indices(rows: int, device: torch.device) -> Tensor:
    """Returns the indices of the sampled rows, spaced evenly."""
    count = min(_ROWS, rows)
    return torch.arange(count, device=device) * rows // max(count, 1)


class Survey:
    """The survey of the input of the layer `name`. A replay passes tensors to a survey as to an observer
    (observers.py)."""

    read = staticmethod(survey_of)

    def __init__(self, current: CurrentCall, name: str) -> None:
        self._current, self.name = current, name
        self.train, self.held_out = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self._leaders: set[str] = set()
        self._source = (-1, 0)

    def add(self, reading: SurveyReading) -> None:
        held_out, position = self._current.held_out, self._current.position
        self._source = (position, self._source[1] + 1 if self._source[0] == position else 0)
        (self.held_out if held_out else self.train).add(reading.channels)
        (self._held_rows if held_out else self._train_rows).add(reading.rows, self._current.level, self._source)
        reading.surveys.append(self)
        self._leaders.add(reading.surveys[0].name)

    def copy(self, current: CurrentCall) -> "Survey":
        """Returns a copy of the survey in its present state that refers to the call `current`, a copy of the original's
        current call. The tensors are shared; no method writes to them."""
        survey = copy.copy(self)
        survey._current = current
        survey.train, survey.held_out = copy.copy(self.train), copy.copy(self.held_out)
        survey._train_rows, survey._held_rows = self._train_rows.copy(), self._held_rows.copy()
        survey._leaders = set(self._leaders)
        return survey

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """Two samples of rows: of the calls that are not held out, and of the held-out calls."""
        return self._train_rows, self._held_rows

    def merge(self, other: "Survey") -> None:
        """Adds all observations of `other`. The samples of both must have been thinned together before."""
        self.train.merge(other.train)
        self.held_out.merge(other.held_out)
        for mine, theirs in zip(self.samples, other.samples, strict=True):
            mine.merge(theirs)
        self._leaders |= other._leaders

    @property
    def has_input(self) -> bool:
        """True if the layer had any input."""
        return self.train.rows + self.held_out.rows > 0

    @property
    def has_held_out(self) -> bool:
        """True if the layer had inputs in held-out calls and in other calls."""
        return self.train.rows > 0 and self.held_out.rows > 0

    @property
    def all(self) -> Channels:
        """The statistics of all calls."""
        merged = Channels()
        merged.merge(self.train)
        merged.merge(self.held_out)
        return merged

    @property
    def fit_channels(self) -> Channels:
        """The channel statistics from which choices may be made: of the calls that are not held out, or of all calls
        where one of the two kinds is missing."""
        return self.train if self.has_held_out else self.all

    @property
    def fit_sample(self) -> Sample:
        """The sample of rows from which choices may be made: of the calls that are not held out, or of the held-out
        calls where there are no others. Raises ValueError where the layer had no input."""
        if not self.has_input:
            raise ValueError("no input was observed")
        return self._train_rows or self._held_rows

    @property
    def judge_sample(self) -> Sample:
        """The sample of rows on which choices are judged: of the held-out calls, or of the other calls where none are
        held out. Raises ValueError where the layer had no input."""
        if not self.has_input:
            raise ValueError("no input was observed")
        return self._held_rows or self._train_rows

    @property
    def leader(self) -> str:
        """The name of the first layer that received the same tensors as this layer in every call; this layer's own name
        where there is no such layer."""
        return next(iter(self._leaders)) if len(self._leaders) == 1 else self.name

    @property
    def has_tokens(self) -> bool:
        """True if the input consists of tokens, False if it has few rows for each sample of the batch, as a modulation
        has."""
        return self.train.rows + self.held_out.rows > _FEW * self._current.samples
