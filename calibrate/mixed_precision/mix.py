"""Chooses a scheme for each layer under a budget, by the error of the pipeline's final latents."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from octavo.capture.errors import NumbersError, OctavoError, UsageError

from ..byte_sizes import size
from ..choice import Choice
from ..layers.inputs import WORDS, Input
from ..plan import KINDS, Plan, block_names
from ..replay.calls import Progress
from ..replay.work import Work
from .budget import Budget, Cost, Search, summed
from .exchange import refine
from .knapsack import Groups, choose, least, total
from .sensitivity import Candidates, LayerGroup, Runs, Trajectory, cost_of, float_cost, grouped, measured

_ADDING = 1.5  # ratio of measured to estimated error: above it errors do not add up, and exchanges are tried


@dataclass(frozen=True)
class Mixture:
    """The outcome of a budget: the plan, the choices for its layers, the entry in report.json, and by layer the error
    of each scheme of its group."""

    plan: Plan
    choices: dict[str, Choice]
    report: dict[str, Any]
    errors: dict[str, dict[str, float]]


def mixed(
    model: nn.Module,
    plan: Plan,
    choices: Mapping[str, Choice],
    budget: Budget,
    search: Search,
    trajectory: Trajectory,
    work: Work,
) -> Mixture:
    """Finds a mixture of schemes and float layers that keeps `budget` with a small error of the final latents.

    Layers of the plan without a choice stay as they are. Raises UsageError for a budget that no mixture keeps, and for
    one that the float model keeps; NumbersError where the latents of the mixture are not finite; MisfitError and
    NumbersError as `Runs.begin` does. Collective: the ranks of `work` share the runs for single groups.
    """
    runs, candidates = Runs(model, trajectory), Candidates(model, choices)
    runs.begin([entry.name for entry in plan.entries if entry.kind in KINDS.values()])
    before = float_cost(plan, runs.macs)
    names = [name for name in plan.quantized if name in choices]
    fixed = summed(cost for name, cost in before.items() if name not in names)
    limit = _checked(budget, before, _smallest(candidates, names, search.inputs, before).plus(fixed))
    division = grouped(names, block_names(model), search.runs // len(search.inputs))
    groups = measured(candidates, division, search.inputs, before, runs, work)
    found = _found(budget, groups, candidates, limit.minus(fixed), runs, search, work.progress)
    if found is None:
        raise _infeasible(budget, least([group.options for group in groups]).plus(fixed), summed(before.values()))
    kinds = _kinds(groups, found.chosen)
    used = total([group.options for group in groups], found.chosen).plus(fixed)
    report = {
        **_spent(budget, limit, summed(before.values()), used),
        "schemes": {WORDS[kind]: sum(each is kind for each in kinds.values()) for kind in search.inputs},
        "float": len(names) - len(kinds),
        **_trust(groups, found, runs),
    }
    made = {name: candidates.choice(name, kind) for name, kind in kinds.items()}
    return work.ranks.first(Mixture(_planned(plan, names, kinds, budget), made, report, _errors(groups)))


class _Found(NamedTuple):
    """The option of each group, the measured error, the error before exchanges, and the number of exchanges."""

    chosen: tuple[int, ...]
    error: float
    before: float
    exchanges: int


def _found(
    budget: Budget,
    groups: Sequence[LayerGroup],
    candidates: Candidates,
    room: Cost,
    runs: Runs,
    search: Search,
    progress: Progress,
) -> _Found | None:
    """Chooses within the limit `room`, measures the choice, and tries exchanges where errors do not add up. None where
    no choice keeps the limit."""
    options = [group.options for group in groups]
    chosen = choose(options, room)
    if chosen is None:
        return None

    def run(each: Sequence[int]) -> float:
        return runs.error(candidates.layers(_kinds(groups, each)))

    first = run(chosen)
    if not first < float("inf"):
        raise NumbersError(f"budget '{budget.text}': the latents are not finite with it. Give more.")
    if first <= _ADDING * estimated_error(options, chosen):
        return _Found(tuple(chosen), first, first, 0)
    best, error, exchanges = refine(options, chosen, first, room, run, search.refining, progress)
    return _Found(best, error, first, exchanges)


def _trust(groups: Sequence[LayerGroup], found: _Found, runs: Runs) -> dict[str, Any]:
    """The errors of the final latents for report.json, with the numbers of exchanges, groups and runs."""
    estimated = estimated_error([group.options for group in groups], found.chosen)
    relative = found.error / (runs.signal or 1.0)
    return {
        "error": {"relative": relative, "measured": found.error, "estimated": estimated, "before": found.before},
        "exchanges": found.exchanges,
        "groups": len(groups),
        "runs": runs.count,
    }


def estimated_error(groups: Groups, chosen: Sequence[int]) -> float:
    """The sum of the errors of the groups."""
    return sum(options[at].error for options, at in zip(groups, chosen, strict=True))


def _kinds(groups: Sequence[LayerGroup], chosen: Sequence[int]) -> dict[str, type[Input]]:
    """The way in which the input of each integer layer becomes codes, by name."""
    pairs = zip(groups, chosen, strict=True)
    return {name: kind for group, option in pairs for name, kind in group.kinds[option].items()}


def _planned(plan: Plan, names: Iterable[str], kinds: Mapping[str, type[Input]], budget: Budget) -> Plan:
    """The plan with the schemes of `kinds`; layers of `names` without an entry in `kinds` stay float."""
    words = {name: WORDS[kind] for name, kind in kinds.items()}
    plan = Plan(tuple(replace(entry, scheme=words.get(entry.name, entry.scheme)) for entry in plan.entries))
    reason = f"matters most within the budget of {budget.text}"
    return plan.kept_float({name: reason for name in names if name not in kinds})


def _errors(groups: Iterable[LayerGroup]) -> dict[str, dict[str, float]]:
    """The error of each scheme of a layer's group, by layer and scheme."""
    return {
        name: {WORDS[option.kind]: option.error for option in group.options if option.kind}
        for group in groups
        for name in group.names
    }


def _spent(budget: Budget, limit: Cost, whole: Cost, used: Cost) -> dict[str, Any]:
    """The budget and the used part of it for report.json: bytes, and time relative to float."""
    most = [None if part == float("inf") else part for part in (limit.bytes, limit.time / whole.time)]
    return {
        "budget": budget.text,
        "bytes": {"float": int(whole.bytes), "limit": most[0], "used": int(used.bytes)},
        "time": {"float": 1.0, "limit": most[1], "used": used.time / whole.time},
    }


def _smallest(
    candidates: Candidates, names: Iterable[str], kinds: Sequence[type[Input]], before: Mapping[str, Cost]
) -> Cost:
    """The smallest possible bytes and the smallest possible time of the layers, each minimised on its own."""
    found = Cost()
    for name in names:
        made = [candidates.layer(name, kind) for kind in kinds]
        costs = [before[name], *(cost_of(layer, before[name]) for layer in made if not isinstance(layer, str))]
        found = found.plus(Cost(min(cost.bytes for cost in costs), min(cost.time for cost in costs)))
    return found


def _checked(budget: Budget, before: Mapping[str, Cost], smallest: Cost) -> Cost:
    """The limit of the budget, checked before the long measurement: raises UsageError where no mixture keeps the limit,
    and where the float model does."""
    whole = summed(before.values())
    limit = budget.limit(whole)
    if not smallest.within(limit):
        raise _infeasible(budget, smallest, whole)
    if whole.within(limit):
        fact = f"all layers keep it as floats ({size(whole.bytes)})"
        raise UsageError(f"budget '{budget.text}': {fact}. Give a smaller one.")
    return limit


def _infeasible(budget: Budget, smallest: Cost, whole: Cost) -> OctavoError:
    found = []
    if budget.bytes is not None or budget.share is not None:
        found.append(f"{size(smallest.bytes)} ({math.ceil(1000 * smallest.bytes / whole.bytes) / 10:.1f}%)")
    if budget.time is not None:
        found.append(f"{math.ceil(1000 * smallest.time / whole.time) / 1000:.3f}x")
    fact = f"the layers take at least {' and '.join(found)}"
    return UsageError(f"budget '{budget.text}': {fact}. Give more, or keep fewer layers float.")
