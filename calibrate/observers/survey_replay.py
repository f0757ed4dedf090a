"""Replays calls with surveys of the inputs of layers, and merges the surveys of several processes."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from octavo.capture.ranks import Ranks

from ..plan import Plan, named
from ..replay.calls import Calls, first
from ..replay.current_call import CurrentCall
from ..replay.hooks import observe, observing
from ..replay.snapshots import CallCount, Snapshots
from ..replay.work import Work
from .observers import Options
from .patches import PatchSurvey
from .ranges import WHOLE, Binned, Ranges, observed
from .survey import Survey


class Known(NamedTuple):
    """The surveys by layer name, and the state `turn` of the calls that the surveys observed."""

    current: CurrentCall
    surveys: dict[str, Survey]


class Surveyed(NamedTuple):
    """The observations of one replay: `known` of all calls, `snapshots` of this process at each snapshot; `last` is the
    end of the calls.

    `ranges`, and `range_snapshots` at each snapshot, are those of the convolutions' inputs, where the smallest and the
    largest value are the range; `silent` are the convolutions without input.
    """

    known: Known
    calls: int
    last: CallCount
    snapshots: Mapping[CallCount, Known]
    ranges: Ranges
    range_snapshots: Mapping[CallCount, Ranges]
    silent: frozenset[str]


def surveyed(
    model: nn.Module,
    calls: Calls,
    samples: int | None,
    plan: Plan,
    work: Work,
    *,
    convolutions: bool,
    options: Options | None,
) -> Surveyed:
    """Replays the first `samples` calls with a survey of each linear of the plan, and with `convolutions` of these too.
    With `options` of observers, the ranges of all convolutions' inputs are observed beside it, without bins.

    Collective: the ranks share the calls. Raises as `replay.hooks.observe` does.
    """
    current = CurrentCall(model, work.ranks)
    modules = {entry.name: module for entry, module in named(model, plan)}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    others = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    surveys: dict[str, Survey] = {name: Survey(current, name) for name in linears}
    if convolutions:
        surveys |= {name: PatchSurvey(current, name, module) for name, module in others.items()}
    binned = {} if options is None else {name: Binned("minmax", options, current, WHOLE, None) for name in others}

    def known() -> Known:
        now = copy.copy(current)
        return Known(now, {name: survey.copy(now) for name, survey in surveys.items()})

    snapshots = Snapshots(lambda: (known(), observed(binned, work.ranks)))
    shown = work.progress("survey", first(calls, samples), samples)
    with observing(model, binned):
        count = observe(model, surveys, current.tracked(snapshots.taking(shown)), work.ranks)
    ranges = observed(binned, work.ranks)
    return Surveyed(
        united(Known(current, surveys), work.ranks), count, snapshots.last,
        {count: state[0] for count, state in snapshots.by_count.items()}, ranges,
        {count: state[1] for count, state in snapshots.by_count.items()}, frozenset(binned) - set(ranges),
    )  # fmt: skip


def united(known: Known, ranks: Ranks) -> Known:
    """Merges the observations of ranks that shared the calls; equal to those of one process over all calls. Collective.

    Moves no more rows than the merged samples keep.
    """
    current, surveys = known
    sizes = ranks.gather({name: [sample.sizes() for sample in survey.samples] for name, survey in surveys.items()})
    for name, survey in surveys.items():
        for index, sample in enumerate(survey.samples):
            sample.thin([each[name][index] for each in sizes])
    bare = {name: survey.copy(None) for name, survey in surveys.items()}  # type: ignore[arg-type]
    parts = ranks.gather((current.samples, current.levels, bare))
    levels = {position: level for part in parts for position, level in part[1].items()}
    joined = current.joined(sum(part[0] for part in parts), levels)
    merged = {name: survey.copy(joined) for name, survey in parts[0][2].items()}
    for _, _, others in parts[1:]:
        for name, survey in merged.items():
            survey.merge(others[name])
    return Known(joined, merged)
