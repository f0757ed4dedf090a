"""Replays calls with surveys of the layers' inputs, and merges the surveys of several processes."""

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
    """The surveys by layer name, and `current`, the state of the calls that the surveys observed."""

    current: CurrentCall
    surveys: dict[str, Survey]


class SurveyResult(NamedTuple):
    """The observations of one replay.

    | field           | meaning                                                                                  |
    |-----------------|------------------------------------------------------------------------------------------|
    | state           | the surveys of all calls, merged over all ranks                                          |
    | calls           | the number of calls                                                                      |
    | last            | the count at the end of the calls                                                        |
    | snapshots       | the surveys of this process at each snapshot                                             |
    | ranges          | ranges of the convolutions' inputs, where the range is minimum to maximum                |
    | range_snapshots | the same ranges at each snapshot                                                         |
    | silent          | the convolutions without input                                                           |
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
    """Replays the first `samples` calls with a survey of each linear of the plan; with `convolutions`, of each
    convolution too.

    With `options` of observers, the replay also records the minimum-to-maximum range of every convolution's input, one
    range for all noise levels. Collective: the ranks share the calls. Raises as `replay.hooks.observe` does.
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
    """Merges the observations of ranks that shared the calls; the result equals that of one process over all calls.
    Collective.

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
