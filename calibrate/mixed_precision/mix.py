"""Chooses a scheme for each layer under a budget, by the error of the pipeline's final latents."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from octavo.capture.errors import NumbersError, OctavoError, UsageError

from ..byte_sizes import size
from ..choice import Choice
from ..plan import KINDS, Plan, block_names
from ..replay.calls import Progress
from ..replay.work import Work
from .budget import Budget, Cost, Search, summed
from .exchange import refine
from .knapsack import Groups, choose, cost_of_choice, lowest_cost
from .sensitivity import Candidates, LayerGroup, Runs, Trajectory, cost_of, divide_layers, float_cost, measure_groups

_ADDING = 1.5  # ratio of measured to estimated error above which errors do not add up, so that exchanges are tried


@dataclass(frozen=True)
class Mixture:
    """Holds the result of a search under a budget: `plan`, the `choices` for its layers, and `report`, the part of
    report.json about the search. `errors` is a dict from layer name to a dict from scheme name to the error of the
    final latents when only the layer's group has this scheme and all other layers are float."""

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

    Layers of the plan without an entry in `choices` are not changed, and count as float layers. `trajectory` runs the
    pipeline and returns its final latents; `search` has the schemes and the number of runs. Collective: the ranks of
    `work` share the runs that measure groups of layers.

    Raises UsageError for a budget that no mixture keeps, or that the float model keeps already; MisfitError for a
    pipeline that runs no layer of the model; NumbersError if the latents of the float model or of the mixture are not
    finite.
    """
    runs, candidates = Runs(model, trajectory), Candidates(model, choices)
    runs.begin([entry.name for entry in plan.entries if entry.kind in KINDS.values()])
    before = float_cost(plan, runs.macs)
    names = [name for name in plan.quantized if name in choices]
    fixed = summed(cost for name, cost in before.items() if name not in names)
    limit = _checked_limit(budget, before, _lower_bounds(candidates, names, search.schemes, before).plus(fixed))
    division = divide_layers(names, block_names(model), search.runs // len(search.schemes))
    groups = measure_groups(candidates, division, search.schemes, before, runs, work)
    selection = _select(budget, groups, candidates, limit.minus(fixed), runs, search, work.progress)
    if selection is None:
        raise _infeasible(budget, lowest_cost([group.options for group in groups]).plus(fixed), summed(before.values()))
    schemes = _schemes_of(groups, selection.chosen)
    used = cost_of_choice([group.options for group in groups], selection.chosen).plus(fixed)
    report = {
        **_budget_report(budget, limit, summed(before.values()), used),
        "schemes": {scheme: list(schemes.values()).count(scheme) for scheme in search.schemes},
        "float": len(names) - len(schemes),
        **_error_report(groups, selection, runs),
    }
    mixed_plan, selected = _plan_with(plan, names, schemes, budget), candidates.choices(schemes)
    return work.ranks.first(Mixture(mixed_plan, selected, report, _errors_by_layer(groups)))


class _Selection(NamedTuple):
    """The selected options (a scheme, or float, for each group of layers). `chosen`: the index of each group's option.
    `error`: the measured error of the final latents with these options. `exchanges`: how often one or two groups were
    given another option because that lowered the error. `before`: the error before the first such exchange."""

    chosen: tuple[int, ...]
    error: float
    before: float
    exchanges: int


def _select(
    budget: Budget,
    groups: Sequence[LayerGroup],
    candidates: Candidates,
    limit: Cost,
    runs: Runs,
    search: Search,
    progress: Progress,
) -> _Selection | None:
    """Chooses an option for each group within `limit`, and measures the error of the choice by a run of the pipeline.
    If this error is more than 1.5 times the sum of the groups' errors, tries exchanges, in which one or two groups
    change their option; `search` limits the runs for them. `candidates` makes the integer layers, `runs` runs the
    pipeline. Returns None if no choice keeps the limit. Raises NumbersError, naming `budget`, if the latents are not
    finite."""
    options = [group.options for group in groups]
    chosen = choose(options, limit)
    if chosen is None:
        return None

    def run(choice: Sequence[int]) -> float:
        return runs.error(candidates.layers(_schemes_of(groups, choice)))

    first = run(chosen)
    if not first < float("inf"):
        fact = "the final latents of the pipeline are not finite with the schemes that this budget allows"
        raise NumbersError(f"budget '{budget.text}': {fact}. Give a larger budget.")
    if first <= _ADDING * estimated_error(options, chosen):
        return _Selection(tuple(chosen), first, first, 0)
    best, error, exchanges = refine(options, chosen, first, limit, run, search.refining, progress)
    return _Selection(best, error, first, exchanges)


def _error_report(groups: Sequence[LayerGroup], selection: _Selection, runs: Runs) -> dict[str, Any]:
    estimated = estimated_error([group.options for group in groups], selection.chosen)
    relative = selection.error / (runs.signal or 1.0)
    return {
        "error": {
            "relative": relative,
            "measured": selection.error,
            "estimated": estimated,
            "before": selection.before,
        },
        "exchanges": selection.exchanges,
        "groups": len(groups),
        "runs": runs.count,
    }


def estimated_error(groups: Groups, chosen: Sequence[int]) -> float:
    """Returns the sum of the errors of the chosen options, which estimates the error of the choice. `chosen` has the
    index of each group's option."""
    return sum(options[index].error for options, index in zip(groups, chosen, strict=True))


def _schemes_of(groups: Sequence[LayerGroup], chosen: Sequence[int]) -> dict[str, str]:
    """Returns a dict from layer name to the name of its scheme, for the layers that become 8-bit layers with the
    options `chosen` (the index of the option of each group)."""
    pairs = zip(groups, chosen, strict=True)
    return {name: scheme for group, option in pairs for name, scheme in group.assignments[option].items()}


def _plan_with(plan: Plan, names: Iterable[str], schemes: Mapping[str, str], budget: Budget) -> Plan:
    """Returns `plan` with the schemes in `schemes`, a dict from layer name to scheme. Layers of `names` that are not in
    `schemes` stay float; the reason in the plan names `budget`."""
    plan = Plan(tuple(replace(entry, scheme=schemes.get(entry.name, entry.scheme)) for entry in plan.entries))
    reason = f"matters most within the budget of {budget.text}"
    return plan.kept_float({name: reason for name in names if name not in schemes})


def _errors_by_layer(groups: Iterable[LayerGroup]) -> dict[str, dict[str, float]]:
    """Returns a dict from layer name to a dict from scheme name to the error of the final latents when only the layer's
    group has this scheme and all other layers are float."""
    return {
        name: {option.scheme: option.error for option in group.options if option.scheme}
        for group in groups
        for name in group.names
    }


def _budget_report(budget: Budget, limit: Cost, whole: Cost, used: Cost) -> dict[str, Any]:
    limits = [None if part == float("inf") else part for part in (limit.bytes, limit.time / whole.time)]
    return {
        "budget": budget.text,
        "bytes": {"float": int(whole.bytes), "limit": limits[0], "used": int(used.bytes)},
        "time": {"float": 1.0, "limit": limits[1], "used": used.time / whole.time},
    }


def _lower_bounds(
    candidates: Candidates, names: Iterable[str], schemes: Sequence[str], before: Mapping[str, Cost]
) -> Cost:
    """Returns the smallest bytes and the smallest time that the layers `names` can take, each minimised on its own, if
    each layer has a scheme of `schemes` or stays float. `before` has the cost of each layer as a float layer;
    `candidates` makes the integer layers."""
    bounds = Cost()
    for name in names:
        candidate_layers = [candidates.layer(name, scheme) for scheme in schemes]
        costs = [
            before[name],
            *(cost_of(layer, before[name]) for layer in candidate_layers if not isinstance(layer, str)),
        ]
        bounds = bounds.plus(Cost(min(cost.bytes for cost in costs), min(cost.time for cost in costs)))
    return bounds


def _checked_limit(budget: Budget, before: Mapping[str, Cost], smallest: Cost) -> Cost:
    """Returns the bytes and the time that the budget allows. `before` has the cost of each layer as a float layer;
    `smallest` has the fewest bytes and the least time that a mixture can take.

    Raises UsageError, before the long measurement, if no mixture keeps the limit, or if the float model itself keeps
    it.
    """
    whole = summed(before.values())
    limit = budget.limit(whole)
    if not smallest.within(limit):
        raise _infeasible(budget, smallest, whole)
    if whole.within(limit):
        fact = f"this budget is large enough for all layers in float ({size(whole.bytes)})"
        raise UsageError(f"budget '{budget.text}': {fact}. Give a smaller budget.")
    return limit


def _infeasible(budget: Budget, smallest: Cost, whole: Cost) -> OctavoError:
    """Returns the UsageError for a budget that is below `smallest`, the least cost of the layers. The message gives the
    fewest bytes or the least time that the layers can take, also relative to `whole`, the cost of the float layers."""
    needs = []
    if budget.bytes is not None or budget.share is not None:
        needs.append(f"{size(smallest.bytes)} ({math.ceil(1000 * smallest.bytes / whole.bytes) / 10:.1f}%)")
    if budget.time is not None:
        needs.append(f"{math.ceil(1000 * smallest.time / whole.time) / 1000:.3f}x")
    fact = f"the layers take at least {' and '.join(needs)}"
    return UsageError(f"budget '{budget.text}': {fact}. Give a larger budget, or keep fewer layers float.")
