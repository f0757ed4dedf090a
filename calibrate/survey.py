"""The survey: what one replay learns of the input of each layer, and a sample of its rows from calls held out.

What is chosen by looking at inputs is judged on the sample of others, so that nothing is chosen that only fits the
calls it was chosen on. Held out is every fourth prompt; every fourth call, where calls do not say which prompt they are
of.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capture.recorder import bind

from .calls import Call
from .channels import ChannelReading, Channels, channels_of
from .noise import levels_of

_FOLD = 4  # prompts, of which the last is held out
_ROWS = 8  # of each tensor
_MOST = 512  # rows of a sample; it is halved when there are more
_FEW = 8  # rows for each sample of a batch: fewer are one row of a modulation, not tokens


def held_out(number: int) -> bool:
    """Whether the prompt (or call) of this number is held out."""
    return number % _FOLD == _FOLD - 1


class Turn:
    """What is known of the call that is running, and of all calls so far.

    `held`: it is held out. `level`: its noise level, None without one. `levels`: of all. `samples`: in all batches.
    `training`: the positions of calls that are not held out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        self.held, self.level, self.count, self.samples = False, None, 0, 0
        self.levels: list[float] = []
        self.training: list[int] = []

    level: float | None

    def each(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls; while one is at work, this is about it."""
        for position, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            self.held = held_out(position if unit is None else unit)
            named = self._named(call)
            levels = levels_of(named)
            self.level = None if levels is None else float(levels.max())
            if self.level is not None:
                self.levels.append(self.level)
            if not self.held:
                self.training.append(position)
            self.count += 1
            self.samples += next((len(x) for x in named.values() if isinstance(x, Tensor) and x.ndim > 1), 1)
            yield call

    def _named(self, call: Call) -> dict[str, Any]:
        try:
            return bind(self._signature, tuple(call.args), dict(call.kwargs))[1]
        except TypeError:
            return {}  # running it says what is wrong


class SurveyReading(NamedTuple):
    """What is kept of one tensor; `heard` lists the surveys that heard it."""

    channels: ChannelReading
    rows: Tensor  # (rows, channels), in the tensor's dtype
    heard: list["Survey"]


def survey_of(x: Tensor) -> SurveyReading:
    """Reads a tensor (..., channels). Raises ValueError when it is empty or holds values that are not finite."""
    rows = x.detach().reshape(-1, x.shape[-1])
    taken = min(_ROWS, len(rows))
    places = torch.arange(taken, device=x.device) * len(rows) // max(taken, 1)
    return SurveyReading(channels_of(x), rows[places], [])


class Sample:
    """Rows spread over what it was given, at most `_MOST` of them, and their noise levels."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, float | None]] = []
        self._every, self._seen = 1, 0

    def add(self, rows: Tensor, level: float | None) -> None:
        if self._seen % self._every == 0:
            self._kept.append((rows, level))
        self._seen += 1
        if sum(len(rows) for rows, _ in self._kept) > _MOST and len(self._kept) > 1:
            self._kept, self._every = self._kept[::2], self._every * 2

    def copy(self) -> "Sample":
        """What it holds now."""
        made = copy.copy(self)
        made._kept = list(self._kept)
        return made

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def rows(self) -> Tensor:
        """(rows, channels)."""
        return torch.cat([rows for rows, _ in self._kept])

    @property
    def levels(self) -> Tensor | None:
        """(rows,) float32; None where a call has no noise level."""
        if any(level is None for _, level in self._kept):
            return None
        return torch.cat([torch.full((len(rows),), float(level or 0.0)) for rows, level in self._kept])


class Survey:
    """What is known of one layer's input; it hears as an observer (observers.py) does."""

    read = staticmethod(survey_of)

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.train, self.held = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self._leaders: set[int] = set()
        self._leader: Survey = self

    def add(self, reading: SurveyReading) -> None:
        held = self._turn.held
        (self.held if held else self.train).add(reading.channels)
        (self._held_rows if held else self._train_rows).add(reading.rows, self._turn.level)
        reading.heard.append(self)
        self._leader = reading.heard[0]
        self._leaders.add(id(self._leader))

    def copy(self) -> "Survey":
        """What it knows now; the tensors are shared, none is written to."""
        made = copy.copy(self)
        made._turn = copy.copy(self._turn)
        made.train, made.held = copy.copy(self.train), copy.copy(self.held)
        made._train_rows, made._held_rows = self._train_rows.copy(), self._held_rows.copy()
        made._leaders = set(self._leaders)
        return made

    @property
    def seen(self) -> bool:
        """Whether there was an input."""
        return self.train.rows + self.held.rows > 0

    @property
    def split(self) -> bool:
        """Whether there are calls of both kinds."""
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
        """What a choice may look at: calls that are not held out; all, where there are none of one kind."""
        return self.train if self.split else self.all

    @property
    def judged(self) -> Sample:
        """Rows of the other calls, to judge a choice on. Raises ValueError without an input."""
        if not self.seen:
            raise ValueError("saw no data")
        return self._held_rows or self._train_rows

    @property
    def leader(self) -> "Survey":
        """The first survey that always heard the same tensors as this one; itself, where it alone did."""
        return self._leader if len(self._leaders) == 1 else self

    @property
    def tokens(self) -> bool:
        """Whether the input holds tokens, and not one row for each sample."""
        return self.train.rows + self.held.rows > _FEW * self._turn.samples
