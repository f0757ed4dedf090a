"""The survey: what one replay learns of the input of each layer, and a sample of its rows from calls held out.

What is chosen by looking at inputs is judged on the sample of others, so that nothing is chosen that only fits the calls
it was chosen on. Held out is every fourth prompt (every fourth call, where calls do not say of which prompt they are).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Call
from .channels import ChannelReading, Channels, channels_of

_FOLD = 4  # prompts, of which the last is held out
_ROWS = 8  # of each tensor
_MOST = 512  # rows of a sample; it is halved when there are more


class Turn:
    """Whether the call that is running is held out."""

    def __init__(self) -> None:
        self.held = False

    def each(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls; while one is at work, `held` is its."""
        for position, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            self.held = (position if unit is None else unit) % _FOLD == _FOLD - 1
            yield call


class SurveyReading(NamedTuple):
    """What is kept of one tensor."""

    channels: ChannelReading
    rows: Tensor  # (rows, channels), in the tensor's dtype


def survey_of(x: Tensor) -> SurveyReading:
    """Reads a tensor (..., channels). Raises ValueError when it is empty or holds values that are not finite."""
    rows = x.detach().reshape(-1, x.shape[-1])
    places = torch.arange(min(_ROWS, len(rows)), device=x.device) * len(rows) // min(_ROWS, max(len(rows), 1))
    return SurveyReading(channels_of(x), rows[places])


class Sample:
    """Rows spread over what it was given, at most `_MOST` of them."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._every, self._seen = 1, 0

    def add(self, rows: Tensor) -> None:
        if self._seen % self._every == 0:
            self._tensors.append(rows)
        self._seen += 1
        if sum(map(len, self._tensors)) > _MOST and len(self._tensors) > 1:
            self._tensors, self._every = self._tensors[::2], self._every * 2

    def rows(self) -> Tensor | None:
        """(rows, channels), or None."""
        return torch.cat(self._tensors) if self._tensors else None


class Survey:
    """What is known of one layer's input."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.train, self.held = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self.calls = 0

    @property
    def read(self) -> Any:
        return survey_of

    def add(self, reading: SurveyReading) -> None:
        held = self._turn.held
        (self.held if held else self.train).add(reading.channels)
        (self._held_rows if held else self._train_rows).add(reading.rows)
        self.calls += 1

    @property
    def all(self) -> Channels:
        """The statistics of all calls."""
        merged = Channels()
        merged.merge(self.train)
        merged.merge(self.held)
        return merged

    @property
    def seen(self) -> bool:
        """Whether there was an input."""
        return self.calls > 0

    @property
    def split(self) -> bool:
        """Whether there are calls of both kinds."""
        return self.train.rows > 0 and self.held.rows > 0

    @property
    def fitted(self) -> Channels:
        """What a choice may look at: the statistics of calls that are not held out, of all where there is no split."""
        return self.train if self.split else self.all

    @property
    def rows(self) -> Tensor:
        """(rows, channels): what a choice is judged on. Raises ValueError without an input."""
        found = self._held_rows.rows() if self.split else self._train_rows.rows()
        found = self._held_rows.rows() if found is None else found
        if found is None:
            raise ValueError("saw no data")
        return found


Surveys = Mapping[str, Survey]
