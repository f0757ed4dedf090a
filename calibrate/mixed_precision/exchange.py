"""Tries exchanges of options between groups within the limit, and keeps those that whole runs find better."""

from collections.abc import Callable, Iterator, Sequence

from ..replay.calls import Progress
from .budget import Cost
from .knapsack import Groups, total

_WORTH = 0.98  # ratio of errors after and before: an exchange must lower the error by 2 %, less may be chance

Chosen = tuple[int, ...]  # the index of the option of each group


def refine(
    groups: Groups,
    chosen: Sequence[int],
    error: float,
    limit: Cost,
    run: Callable[[Chosen], float],
    most: int,
    progress: Progress,
) -> tuple[Chosen, float, int]:
    """Improves `chosen`, whose measured error is `error`, within `limit`; returns the choice, its error as measured by
    `run`, and how many exchanges led there. Tries `most` exchanges, in the order of their sums of errors."""
    best, kept = tuple(chosen), 0
    tried = {best}
    moves = _moves(groups, best, limit)
    for _ in progress("refine", range(most), most):
        other = next((each for each in moves if each not in tried), None)
        if other is None:
            break
        tried.add(other)
        found = run(other)
        if found < _WORTH * error:
            best, error, kept = other, found, kept + 1
            moves = _moves(groups, best, limit)
    return best, error, kept


def _moves(groups: Groups, chosen: Chosen, limit: Cost) -> Iterator[Chosen]:
    """Yields the choices in which one or two groups change within the limit, the least sum of errors first."""
    now = total(groups, chosen)
    steps = []
    for at, options in enumerate(groups):
        for to, option in enumerate(options):
            if to != chosen[at]:
                old = options[chosen[at]]
                steps.append((at, to, option.error - old.error, option.cost.minus(old.cost)))
    moves: list[tuple[float, tuple[tuple[int, int], ...]]]
    moves = [(error, ((at, to),)) for at, to, error, cost in steps if now.plus(cost).within(limit)]
    better = [step for step in steps if step[2] < 0]
    for at, to, error, cost in better:
        for other, its, worse, saved in steps:
            if other != at and now.plus(cost).plus(saved).within(limit):
                moves.append((error + worse, ((at, to), (other, its))))
    for _, changes in sorted(moves):
        made = list(chosen)
        for at, to in changes:
            made[at] = to
        yield tuple(made)
