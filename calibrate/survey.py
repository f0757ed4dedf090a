"""The survey: what one replay learns of the input of each layer, and a sample of its rows from calls held out.

What is chosen by looking at inputs is judged on the sample of others, so that nothing is chosen that only fits the
calls it was chosen on. Held out is every fourth prompt; every fourth call, where calls do not say which prompt they are
of.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks
from octavo.capture.recorder import bind

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

    `position`: of it. `held`: it is held out. `level`: its noise level, None without one. `training`: the positions of
    calls that are not held out. Of the calls that `ranks` gives to this process alone: `levels`, and `samples` in all
    batches.
    """

    def __init__(self, model: nn.Module, ranks: Ranks = ALONE) -> None:
        self._signature, self._ranks = inspect.signature(model.forward), ranks
        self.position, self.held, self.level, self.count, self.samples = 0, False, None, 0, 0
        self.levels: list[float] = []
        self.training: list[int] = []

    level: float | None

    def each(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls, those of other ranks too, whose arguments are not looked at; while one is at work, this is about
        it."""
        for position, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            self.position, self.held = position, held_out(position if unit is None else unit)
            if not self.held:
                self.training.append(position)
            self.count += 1
            if self._ranks.owns(position):
                self._look(call)
            yield call

    def _look(self, call: Call) -> None:
        named = self._named(call)
        levels = levels_of(named)
        self.level = None if levels is None else float(levels.max())
        if self.level is not None:
            self.levels.append(self.level)
        self.samples += next((len(x) for x in named.values() if isinstance(x, Tensor) and x.ndim > 1), 1)

    def joined(self, samples: int, levels: list[float]) -> "Turn":
        """This with what all ranks know: `samples` in all, and the `levels` of all calls."""
        made = copy.copy(self)
        made.samples, made.levels = samples, levels
        return made

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
    return SurveyReading(channels_of(x), rows[_places(len(rows), x.device)], [])


@lru_cache(64)
def _places(rows: int, device: torch.device) -> Tensor:
    """Of the rows that are kept."""
    taken = min(_ROWS, rows)
    return torch.arange(taken, device=device) * rows // max(taken, 1)


class Kept(NamedTuple):
    """Rows of one tensor. `place`: the position of the call, and of the tensor among those it gave the layer."""

    place: tuple[int, int]
    depth: int
    rows: Tensor
    level: float | None


def depth_of(place: tuple[int, int]) -> int:
    """0 for half of all places, 1 for a quarter, ... in any regular sequence of them, each spread evenly over it.

    Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, 1973, section 6.4) of the position; the tensors
    of a call are as far apart as multiples of the square root of 2.
    """
    return 64 - ((place[0] * 0x9E3779B97F4A7C15 + place[1] * 0x6A09E667F3BCC909) % 2**64).bit_length()


class Sample:
    """Rows spread over what it was given, at most `_MOST` of them, and their noise levels.

    When there are more, the places of the smallest depth go. So what it holds follows from what there was, and not from
    the order it came in or which rank heard it.
    """

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._depth = 0

    def add(self, rows: Tensor, level: float | None, place: tuple[int, int]) -> None:
        """Takes in rows (rows, channels)."""
        depth = depth_of(place)
        if depth >= self._depth:
            self._kept.append(Kept(place, depth, rows, level))
            if sum(len(each.rows) for each in self._kept) > _MOST:
                self.thin([self.sizes()])

    def sizes(self) -> Counter[int]:
        """How many rows it holds of each depth."""
        sizes: Counter[int] = Counter()
        for each in self._kept:
            sizes[each.depth] += len(each.rows)
        return sizes

    def thin(self, sizes: Iterable[Counter[int]]) -> None:
        """Lets go what would be too much with what there is elsewhere: `sizes` of all samples to be merged."""
        total = sum(sizes, Counter[int]())
        while sum(count for depth, count in total.items() if depth >= self._depth) > _MOST:
            self._depth += 1
        self._kept = [each for each in self._kept if each.depth >= self._depth]

    def merge(self, other: "Sample") -> None:
        """Takes in all that `other` holds, both thinned together before."""
        self._depth = max(self._depth, other._depth)
        self._kept = sorted(self._kept + other._kept, key=lambda each: each.place)

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
        return torch.cat([each.rows for each in self._kept])

    @property
    def levels(self) -> Tensor | None:
        """(rows,) float32; None where a call has no noise level."""
        if any(each.level is None for each in self._kept):
            return None
        return torch.cat([torch.full((len(each.rows),), float(each.level or 0.0)) for each in self._kept])


class Survey:
    """What is known of the input of the layer `name`; it hears as an observer (observers.py) does."""

    read = staticmethod(survey_of)

    def __init__(self, turn: Turn, name: str) -> None:
        self._turn, self.name = turn, name
        self.train, self.held = Channels(), Channels()
        self._train_rows, self._held_rows = Sample(), Sample()
        self._leaders: set[str] = set()
        self._place = (-1, 0)

    def add(self, reading: SurveyReading) -> None:
        held, position = self._turn.held, self._turn.position
        self._place = (position, self._place[1] + 1 if self._place[0] == position else 0)
        (self.held if held else self.train).add(reading.channels)
        (self._held_rows if held else self._train_rows).add(reading.rows, self._turn.level, self._place)
        reading.heard.append(self)
        self._leaders.add(reading.heard[0].name)

    def copy(self, turn: Turn) -> "Survey":
        """What it knows now, `turn` being a copy of its turn; the tensors are shared, none is written to."""
        made = copy.copy(self)
        made._turn = turn
        made.train, made.held = copy.copy(self.train), copy.copy(self.held)
        made._train_rows, made._held_rows = self._train_rows.copy(), self._held_rows.copy()
        made._leaders = set(self._leaders)
        return made

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """Of the calls that are not held out, and of those that are."""
        return self._train_rows, self._held_rows

    def merge(self, other: "Survey") -> None:
        """Takes in all that `other` knows, their samples thinned together before."""
        self.train.merge(other.train)
        self.held.merge(other.held)
        for mine, its in zip(self.samples, other.samples, strict=True):
            mine.merge(its)
        self._leaders |= other._leaders

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
    def fitting(self) -> Sample:
        """Rows of the calls that a choice may look at. Raises ValueError without an input."""
        if not self.seen:
            raise ValueError("saw no data")
        return self._train_rows or self._held_rows

    @property
    def judged(self) -> Sample:
        """Rows of the other calls, to judge a choice on. Raises ValueError without an input."""
        if not self.seen:
            raise ValueError("saw no data")
        return self._held_rows or self._train_rows

    @property
    def leader(self) -> str:
        """The name of the first layer that was always given the same tensors as this one; its own, where it alone was
        given them."""
        return next(iter(self._leaders)) if len(self._leaders) == 1 else self.name

    @property
    def tokens(self) -> bool:
        """Whether the input holds tokens, and not one row for each sample."""
        return self.train.rows + self.held.rows > _FEW * self._turn.samples


def united(turn: Turn, surveys: Mapping[str, Survey], ranks: Ranks) -> tuple[Turn, dict[str, Survey]]:
    """What all ranks know, of calls that they shared: as one process knows it that heard all of them. Collective.

    No more rows are moved than are kept of all.
    """
    sizes = ranks.gather({name: [sample.sizes() for sample in each.samples] for name, each in surveys.items()})
    for name, survey in surveys.items():
        for at, sample in enumerate(survey.samples):
            sample.thin([each[name][at] for each in sizes])
    bare = {name: survey.copy(None) for name, survey in surveys.items()}  # type: ignore[arg-type]
    parts = ranks.gather((turn.samples, turn.levels, bare))
    joined = turn.joined(sum(part[0] for part in parts), [level for part in parts for level in part[1]])
    made = {name: survey.copy(joined) for name, survey in parts[0][2].items()}
    for _, _, others in parts[1:]:
        for name, survey in made.items():
            survey.merge(others[name])
    return joined, made
