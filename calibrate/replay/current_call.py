"""Keeps track of the call being replayed: its position, whether it is held out to judge choices, its noise level."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks
from octavo.capture.recorder import bind

from ..layers.noise_level import levels_of
from .calls import Call

_FOLD = 4  # every fourth prompt is held out


def held_out(number: int) -> bool:
    """Returns whether the prompt with this number, counted from 0, is held out to judge choices that were made from the
    other prompts. Every fourth prompt is. Where calls do not name their prompt, `number` is the number of the call."""
    return number % _FOLD == _FOLD - 1


def prompt_of(unit: int | None, position: int) -> int:
    """Returns the number of a call's prompt: `unit`, or if the call does not name its prompt, the `position` of the
    call."""
    return position if unit is None else unit


class CurrentCall:
    """The call being replayed, and totals over the calls so far. The calls are those of all ranks, unless the table
    says otherwise.

    | attribute | meaning                                                                                           |
    |-----------|---------------------------------------------------------------------------------------------------|
    | position  | the position of the current call                                                                  |
    | held_out  | whether the current call is held out, to judge choices that were made from the other calls        |
    | level     | the noise level of the current call; None where it has none                                       |
    | count     | the number of calls so far                                                                        |
    | units     | the prompt number of each call so far; None for a call that does not name its prompt              |
    | training  | the positions of the calls so far that are not held out                                           |
    | levels    | a dict from position to noise level, for the calls that belong to this rank                       |
    | samples   | the number of samples in the batches of the calls that belong to this rank                        |
    """

    def __init__(self, model: nn.Module, ranks: Ranks = ALONE) -> None:
        self._signature, self._ranks = inspect.signature(model.forward), ranks
        self.position, self.held_out, self.level, self.count, self.samples = 0, False, None, 0, 0
        self.levels: dict[int, float] = {}
        self.units: list[int | None] = []
        self.training: list[int] = []

    level: float | None

    def tracked(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Yields the calls, and sets the attributes of this object for each call before the caller runs the call. Calls
        of other ranks are yielded and counted too, but their arguments are not read."""
        for position, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            self.position, self.held_out = position, held_out(prompt_of(unit, position))
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
        """Returns a copy with `samples` and `levels` merged over all ranks. Collective: every rank calls this."""
        parts = self._ranks.gather((self.samples, self.levels))
        levels = {position: level for _, part in parts for position, level in part.items()}
        return self.joined(sum(samples for samples, _ in parts), levels)

    def joined(self, samples: int, levels: dict[int, float]) -> "CurrentCall":
        """Returns a copy with the given totals over all ranks: `samples`, the number of samples, and `levels`, a dict
        from the position of a call to its noise level."""
        joined = copy.copy(self)
        joined.samples, joined.levels = samples, levels
        return joined

    def held_out_count(self, positions: Iterable[int]) -> int:
        """Returns the number of held-out calls among those at `positions`."""
        return len(set(positions).difference(self.training))

    def held_out_or_all(self, positions: Sequence[int]) -> tuple[list[int], bool]:
        """Returns the indices in `positions` of the held-out calls, and True; the indices of all calls, and False, if
        none of them is held out."""
        training = set(self.training)
        held_out = [index for index, position in enumerate(positions) if position not in training]
        return held_out or list(range(len(positions))), bool(held_out)

    def _named(self, call: Call) -> dict[str, Any]:
        try:
            return bind(self._signature, tuple(call.args), dict(call.kwargs))[1]
        except TypeError:
            return {}  # the arguments do not fit the forward: running the call raises the error
