"""The call that is being replayed: its position, whether it is held out for judging, its noise level."""

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks
from octavo.capture.recorder import bind

from ..layers.noise_level import levels_of
from .calls import Call

_FOLD = 4  # of so many prompts in a row, the last one is held out


def held_out(number: int) -> bool:
    """Whether the prompt (or call) of this number is held out."""
    return number % _FOLD == _FOLD - 1


class CurrentCall:
    """The current call of a replay: its `position`, whether it is `held` out, its noise `level` (None without one).

    Over all calls so far: their `count`, `units`, the number of the prompt of each (None where a call does not say it),
    and `training`, the positions of calls not held out. Over the calls that `ranks` gives to this process: their noise
    `levels` by position, and the number of `samples` in all batches.
    """

    def __init__(self, model: nn.Module, ranks: Ranks = ALONE) -> None:
        self._signature, self._ranks = inspect.signature(model.forward), ranks
        self.position, self.held_out, self.level, self.count, self.samples = 0, False, None, 0, 0
        self.levels: dict[int, float] = {}
        self.units: list[int | None] = []
        self.training: list[int] = []

    level: float | None

    def tracked(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Yields the calls and describes each while it runs. Calls of other ranks come too, but their arguments are not
        read."""
        for position, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            self.position, self.held_out = position, held_out(position if unit is None else unit)
            if not self.held_out:
                self.training.append(position)
            self.units.append(unit)
            self.count += 1
            if self._ranks.owns(position):
                self._look(call)
            yield call

    def _look(self, call: Call) -> None:
        arguments = self._named(call)
        levels = levels_of(arguments)
        self.level = None if levels is None else float(levels.max())
        if self.level is not None:
            self.levels[self.position] = self.level
        self.samples += next(
            (len(value) for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1), 1
        )

    def shared(self) -> "CurrentCall":
        """A copy with the totals of all ranks. Collective."""
        parts = self._ranks.gather((self.samples, self.levels))
        levels = {position: level for _, part in parts for position, level in part.items()}
        return self.joined(sum(samples for samples, _ in parts), levels)

    def joined(self, samples: int, levels: dict[int, float]) -> "CurrentCall":
        """A copy with the totals of all ranks: their `samples`, and the `levels` of all calls."""
        joined = copy.copy(self)
        joined.samples, joined.levels = samples, levels
        return joined

    def held_out_count(self, positions: Iterable[int]) -> int:
        """The number of held-out calls among those at `positions`."""
        return len(set(positions).difference(self.training))

    def _named(self, call: Call) -> dict[str, Any]:
        try:
            return bind(self._signature, tuple(call.args), dict(call.kwargs))[1]
        except TypeError:
            return {}  # running the call raises the error
