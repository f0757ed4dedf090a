"""Statistics of stored float tensors, as unit.json holds them for each blob."""

from collections.abc import Sequence
from typing import NamedTuple


class Stats(NamedTuple):
    """Statistics of a float tensor: extremes of its finite values (None without any), the count of values that are not
    finite, and the count of float16 values at float16's largest magnitude (where pipelines clip)."""

    minimum: float | None
    maximum: float | None
    nonfinite: int
    saturated: int


NO_STATS = Stats(None, None, 0, 0)


def join_stats(parts: Sequence[Stats | None]) -> Stats | None:
    """The Stats of a tensor whose blobs have the Stats `parts`."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Stats(
        min((part.minimum for part in known if part.minimum is not None), default=None),
        max((part.maximum for part in known if part.maximum is not None), default=None),
        sum(part.nonfinite for part in known),
        sum(part.saturated for part in known),
    )
