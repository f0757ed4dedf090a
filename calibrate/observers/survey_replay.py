"""Runs the float model on recorded calls with a survey (channel extremes and a sample of rows) of each layer's input,
and merges the surveys of several processes."""

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
from .ranges import ONE_BIN, BinnedObserver, Ranges, gather_ranges
from .survey import Survey


class SurveyState(NamedTuple):
    """Holds `surveys`, a dict from layer name to the survey of its input, and `current`, the CurrentCall that counts
    the calls and samples that the surveys observed."""

    current: CurrentCall
    surveys: dict[str, Survey]


class SurveyResult(NamedTuple):
    """The observations of one replay, which `survey_inputs` returns. A snapshot is what was observed in the first 1, 2,
    4, ... prompts. Both dicts of snapshots have a CallCount, the numbers of calls and prompts, as key.

    | field           | meaning                                                                                     |
    |-----------------|---------------------------------------------------------------------------------------------|
    | state           | the surveys of all calls, merged over all ranks                                             |
    | calls           | the number of calls that all ranks together replayed, the same number as in `last`          |
    | last            | the numbers of calls and of prompts of the whole replay                                     |
    | snapshots       | a dict of snapshots of `state`, but with the surveys of this process alone                  |
    | ranges          | the convolutions' input ranges, from minimum to maximum; empty if they were not asked for   |
    | range_snapshots | a dict of snapshots of `ranges`, over all ranks                                             |
    | silent          | the convolutions that received no input; empty if no ranges were asked for                  |
    """

    state: SurveyState
    calls: int
    last: CallCount
    snapshots: Mapping[CallCount, SurveyState]
    ranges: Ranges
    range_snapshots: Mapping[CallCount, Ranges]
    silent: frozenset[str]


def survey_inputs(
    model: nn.Module,
    calls: Calls,
    samples: int | None,
    plan: Plan,
    work: Work,
    *,
    convolutions: bool,
    options: Options | None,
) -> SurveyResult:
    """Runs `model` on the first `samples` calls (None: all) with a survey of the input of each linear layer in `plan`,
    and of each convolution too if `convolutions` is True.

    If `options`, those of observers, is not None, also records every convolution's input range over all noise levels,
    from minimum to maximum. Collective: `work.ranks` share the calls. Raises MisfitError for a call that does not fit
    the model, and if there are no calls; NumbersError for an input not finite; DeviceError when memory runs out.
    """
    current = CurrentCall(model, work.ranks)
    modules = {entry.name: module for entry, module in named(model, plan)}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    surveys: dict[str, Survey] = {name: Survey(current, name) for name in linears}
    if convolutions:
        surveys |= {name: PatchSurvey(current, name, module) for name, module in convs.items()}
    observers = {name: BinnedObserver("minmax", options, current, ONE_BIN, None) for name in convs if options}

    def snapshot() -> SurveyState:
        call = copy.copy(current)
        return SurveyState(call, {name: survey.copy(call) for name, survey in surveys.items()})

    snapshots = Snapshots(lambda: (snapshot(), gather_ranges(observers, work.ranks)))
    replayed = work.progress("survey", first(calls, samples), samples)
    with observing(model, observers):
        count = observe(model, surveys, current.tracked(snapshots.taking(replayed)), work.ranks)
    ranges = gather_ranges(observers, work.ranks)
    return SurveyResult(
        merge_ranks(SurveyState(current, surveys), work.ranks), count, snapshots.last,
        {count: values[0] for count, values in snapshots.by_count.items()}, ranges,
        {count: values[1] for count, values in snapshots.by_count.items()}, frozenset(observers) - set(ranges),
    )  # fmt: skip


def merge_ranks(state: SurveyState, ranks: Ranks) -> SurveyState:
    """Merges the surveys of all ranks, each of which observed a part of the calls; the result equals that of one
    process over all calls. Collective: every rank calls this with its own `state`.

    Sends no more rows between ranks than the merged samples keep.
    """
    current, surveys = state
    sizes = ranks.gather({name: [sample.sizes() for sample in survey.samples] for name, survey in surveys.items()})
    for name, survey in surveys.items():
        for index, sample in enumerate(survey.samples):
            sample.thin([rank_sizes[name][index] for rank_sizes in sizes])
    bare = {name: survey.copy(None) for name, survey in surveys.items()}  # type: ignore[arg-type]
    parts = ranks.gather((current.samples, current.levels, bare))
    levels = {position: level for part in parts for position, level in part[1].items()}
    joined = current.joined(sum(part[0] for part in parts), levels)
    merged = {name: survey.copy(joined) for name, survey in parts[0][2].items()}
    for _, _, others in parts[1:]:
        for name, survey in merged.items():
            survey.merge(others[name])
    return SurveyState(joined, merged)
