"""Tries exchanges: one or two groups of layers change their option (a scheme, or float) within the limit of bytes and
time. Keeps the exchanges that lower the error of whole runs of the pipeline."""

from collections.abc import Callable, Iterator, Sequence

from ..replay.calls import Progress
from .budget import Cost
from .knapsack import Groups, cost_of_choice

_MAX_ERROR_RATIO = 0.98  # an exchange has to lower the error by at least 2 %: a smaller difference may be chance

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
    """Improves `chosen`, the index of the option (a scheme, or float) of each group of layers, by exchanges: one or two
    groups get another option, within `limit`.

    `error` is the measured error of the final latents with `chosen`; `run` measures this error for another choice,
    by a run of the pipeline. `groups` has the options of each group, with their errors and costs. Tries at most `most`
    exchanges, in ascending order of the estimated error, the sum of the groups' errors. Keeps an exchange that lowers
    the measured error by at least 2 %. Returns the best choice, its measured error, and the number of exchanges that
    were kept. `progress` shows how many were tried.
    """
    best, accepted = tuple(chosen), 0
    measured = {best}
    exchanges = _exchanges(groups, best, limit)
    for _ in progress("refine", range(most), most):
        candidate = next((choice for choice in exchanges if choice not in measured), None)
        if candidate is None:
            break
        measured.add(candidate)
        candidate_error = run(candidate)
        if candidate_error < _MAX_ERROR_RATIO * error:
            best, error, accepted = candidate, candidate_error, accepted + 1
            exchanges = _exchanges(groups, best, limit)
    return best, error, accepted


def _exchanges(groups: Groups, chosen: Chosen, limit: Cost) -> Iterator[Chosen]:
    """Yields choices that differ from `chosen` in the options of one or two groups and cost at most `limit`, in
    ascending order of the sum of the groups' errors."""
    cost_so_far = cost_of_choice(groups, chosen)
    steps = []
    for index, options in enumerate(groups):
        for option_index, option in enumerate(options):
            if option_index != chosen[index]:
                old = options[chosen[index]]
                steps.append((index, option_index, option.error - old.error, option.cost.minus(old.cost)))
    exchanges: list[tuple[float, tuple[tuple[int, int], ...]]]
    exchanges = [
        (error, ((index, option_index),))
        for index, option_index, error, cost in steps
        if cost_so_far.plus(cost).within(limit)
    ]
    better = [step for step in steps if step[2] < 0]
    for index, option_index, error, cost in better:
        for other, other_option, added, other_cost in steps:
            if other != index and cost_so_far.plus(cost).plus(other_cost).within(limit):
                exchanges.append((error + added, ((index, option_index), (other, other_option))))
    for _, changes in sorted(exchanges):
        changed = list(chosen)
        for index, option_index in changes:
            changed[index] = option_index
        yield tuple(changed)
