"""Takes snapshots of a replay's observations after 1, 2, 4, 8, ... prompts, for the learning curve."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from .calls import Call

_SHARE = 10  # the learning curve may run one call for every ten of the replay: a tenth of the replay's time


class CallCount(NamedTuple):
    """The numbers of calls and of prompts that a replay has run; `prompts` is None where calls do not name prompts."""

    calls: int
    prompts: int | None


class Snapshots:
    """Calls the function `take` after 1, 2, 4, 8, ... prompts of a replay, and keeps what `take` returns: a snapshot of
    the replay's observations. If the calls do not name their prompt, each call counts as a prompt.

    `by_count`: a dict from the number of calls and prompts to the snapshot. `last`: the number of calls and prompts so
    far.
    """

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take
        self.by_count: dict[CallCount, Any] = {}
        self.last = CallCount(0, None)

    def taking(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Yields `calls`. When the caller requests the first call after 1, 2, 4, 8, ... whole prompts, calls `take`
        before yielding this call. The caller must have run a call before it requests the next. A call that does not
        name its prompt counts as a prompt."""
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
    """Returns which of `snapshots` the learning curve measures. A snapshot is what a replay observed in its first
    calls; here only their number stands for it. The latest snapshots are returned, as many as can be measured in about
    a tenth of the time of a replay of `count` calls. To measure a snapshot takes a run of `measured` calls. Returns []
    if the time is too short for one snapshot."""
    limit = count // (_SHARE * measured) if measured else 0
    return sorted(snapshots)[-limit:] if limit > 0 else []
