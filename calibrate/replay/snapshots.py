"""Snapshots of a replay's observations after 1, 2, 4, 8, ... prompts, for the learning curve."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from .calls import Call

_SHARE = 10  # the learning curve may run one call for so many of the replay: a tenth of its time


class CallCount(NamedTuple):
    """The progress of a replay: the number of calls and of prompts so far (None where calls do not name prompts)."""

    calls: int
    prompts: int | None


class Snapshots:
    """Calls `take` after 1, 2, 4, 8, ... prompts of a replay, and keeps the results; `last` is the replay's end."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take
        self.by_count: dict[CallCount, Any] = {}
        self.last = CallCount(0, None)

    def taking(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Yields the calls; asking for the next call means that the one before has run."""
        units: set[int] = set()
        for count, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            finished = count if unit is None else len(units)
            if finished and finished & (finished - 1) == 0 and (unit is None or unit not in units):
                self.by_count[self.last] = self._take()
            units |= set() if unit is None else {unit}
            self.last = CallCount(count + 1, len(units) or None)
            yield call


def affordable(snapshots: Iterable[CallCount], count: int, measured: int) -> list[CallCount]:
    """The latest snapshots that can be measured in about a tenth of the time of a replay of `count` calls, with
    `measured` calls for each snapshot; none where a tenth is too little."""
    limit = count // (_SHARE * measured) if measured else 0
    return sorted(snapshots)[-limit:] if limit > 0 else []
