"""Snapshots of what a replay knows after 1, 2, 4, 8, ... prompts, for the learning curve."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from .calls import Call

_SHARE = 10  # of the replay's calls, one in so many is run again for this


class Mark(NamedTuple):
    """How far a replay was: after so many calls of so many prompts (None where calls do not say)."""

    calls: int
    prompts: int | None


class Marks:
    """Calls `take` after 1, 2, 4, 8, ... prompts of a replay, and holds what it returned; `last` is its end."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take
        self.taken: dict[Mark, Any] = {}
        self.last = Mark(0, None)

    def each(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls; when the next one is asked for, the one before was heard."""
        units: set[int] = set()
        for count, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            done = count if unit is None else len(units)
            if done and done & (done - 1) == 0 and (unit is None or unit not in units):
                self.taken[self.last] = self._take()
            units |= set() if unit is None else {unit}
            self.last = Mark(count + 1, len(units) or None)
            yield call


def affordable(marks: Iterable[Mark], count: int, measured: int) -> list[Mark]:
    """The latest of the marks that can be measured with `measured` calls each, and all calls once more, for about a
    tenth of a replay of `count` calls; none where that is too little."""
    able = count // (_SHARE * measured) - 1 if measured else 0
    return sorted(marks)[-able:] if able > 0 else []
