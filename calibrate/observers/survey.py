"""The survey of a layer's input during one replay: statistics of channels, and samples of rows, with a held-out split.

A choice made by looking at inputs is judged on the rows of other, held-out calls, so that no choice wins which only
fits the calls it was made on. Every fourth prompt is held out; every fourth call, where calls do not name their prompt.
"""

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..replay.current_call import CurrentCall
from .extremes import ChannelReading, Channels, channels_of
from .row_sample import Sample

_ROWS = 8  # rows that a survey keeps of each tensor
_FEW = 8  # rows for each sample of a batch: up to so many are rows of a modulation, not tokens


class SurveyReading(NamedTuple):
    """A survey's statistics and rows of one tensor; `heard` lists the surveys that observed the tensor."""

    channels: ChannelReading
    rows: Tensor  # (rows, channels), in the tensor's dtype
    heard: list["Survey"]


def survey_of(x: Tensor) -> SurveyReading:
    """Reads a tensor (..., channels). Raises ValueError when `x` is empty or holds values that are not finite."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return SurveyReading(channels_of(x), rows[_places(len(rows), x.device)], [])


@lru_cache(64)
def _places(rows: int, device: torch.device) -> Tensor:
    """The indices of the kept rows, spaced evenly."""
    taken = min(_ROWS, rows)
    return torch.arange(taken, device=device) * rows // max(taken, 1)


class Survey:
    """The survey of the input of the layer `name`, which records inputs as an observer (observers.py) does."""

    read = staticmethod(survey_of)

    def __init__(self, current: CurrentCall, name: str) -> None:
        self._current, self.name = current, name
        self.train, self.held = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self._leaders: set[str] = set()
        self._place = (-1, 0)

    def add(self, reading: SurveyReading) -> None:
        held, position = self._current.held_out, self._current.position
        self._place = (position, self._place[1] + 1 if self._place[0] == position else 0)
        (self.held if held else self.train).add(reading.channels)
        (self._held_rows if held else self._train_rows).add(reading.rows, self._current.level, self._place)
        reading.heard.append(self)
        self._leaders.add(reading.heard[0].name)

    def copy(self, current: CurrentCall) -> "Survey":
        """A copy of the survey as it is now, with `turn`, a copy of its current call; the tensors are shared, and never
        written to."""
        made = copy.copy(self)
        made._current = current
        made.train, made.held = copy.copy(self.train), copy.copy(self.held)
        made._train_rows, made._held_rows = self._train_rows.copy(), self._held_rows.copy()
        made._leaders = set(self._leaders)
        return made

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """The samples of rows of the calls that are not held out, and of the held-out calls."""
        return self._train_rows, self._held_rows

    def merge(self, other: "Survey") -> None:
        """Adds all observations of `other`; the samples of both were thinned together before."""
        self.train.merge(other.train)
        self.held.merge(other.held)
        for mine, its in zip(self.samples, other.samples, strict=True):
            mine.merge(its)
        self._leaders |= other._leaders

    @property
    def seen(self) -> bool:
        """Whether the layer had any input."""
        return self.train.rows + self.held.rows > 0

    @property
    def split(self) -> bool:
        """Whether there are both held-out calls and others."""
        return self.train.rows > 0 and self.held.rows > 0

    @property
    def all(self) -> Channels:
        """The statistics of all calls."""
        merged = Channels()
        merged.merge(self.train)
        merged.merge(self.held)
        return merged

    @property
    def fitted(self) -> Channels:
        """The statistics that a choice may look at: of the calls not held out, or of all where one kind is missing."""
        return self.train if self.split else self.all

    @property
    def fitting(self) -> Sample:
        """Rows of the calls that a choice may look at. Raises ValueError where the layer had no input."""
        if not self.seen:
            raise ValueError("saw no data")
        return self._train_rows or self._held_rows

    @property
    def judged(self) -> Sample:
        """Rows of the held-out calls, to judge a choice on. Raises ValueError where the layer had no input."""
        if not self.seen:
            raise ValueError("saw no data")
        return self._held_rows or self._train_rows

    @property
    def leader(self) -> str:
        """The name of the first layer that always received the same tensors as this layer; this layer's own name where
        no other did."""
        return next(iter(self._leaders)) if len(self._leaders) == 1 else self.name

    @property
    def tokens(self) -> bool:
        """Whether the input holds tokens, and not one row for each sample."""
        return self.train.rows + self.held.rows > _FEW * self._current.samples
