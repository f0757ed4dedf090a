"""Defines the statistics that unit.json holds for each stored float tensor, or row of a float tensor."""

from collections.abc import Sequence
from typing import NamedTuple


class Stats(NamedTuple):
    """The statistics of a float tensor.

    `minimum` and `maximum` are taken over the finite values, None if there are none. `nonfinite` counts NaN and Inf.
    `saturated` counts float16 values of float16's largest magnitude, 65504, to which pipelines clip.
    """

    minimum: float | None
    maximum: float | None
    nonfinite: int
    saturated: int


NO_STATS = Stats(None, None, 0, 0)


def join_stats(parts: Sequence[Stats | None]) -> Stats | None:
    """Combines `parts`, the Stats of the separately stored rows of a tensor, into the Stats of the whole tensor.

    Returns None if no row has Stats.
    """
    stats = [part for part in parts if part is not None]
    if not stats:
        return None
    return Stats(
        min((part.minimum for part in stats if part.minimum is not None), default=None),
        max((part.maximum for part in stats if part.maximum is not None), default=None),
        sum(part.nonfinite for part in stats),
        sum(part.saturated for part in stats),
    )
