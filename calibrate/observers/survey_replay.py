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
from ..replay.hooks import observe
from ..replay.snapshots import CallCount, Snapshots
from ..replay.work import Work
from .patches import PatchSurvey
from .survey import Survey


class SurveyState(NamedTuple):
    """Holds `surveys`, a dict from layer name to the survey of its input, and `current`, the CurrentCall that counts
    the calls and samples that the surveys observed."""

    current: CurrentCall
    surveys: dict[str, Survey]


class SurveyResult(NamedTuple):
    """The observations of one replay, which `survey_inputs` returns. A snapshot is what was observed in the first 1, 2,
    4, ... prompts. The dict of snapshots has a CallCount, the numbers of calls and prompts, as key.

    | field     | meaning                                                                            |
    |-----------|------------------------------------------------------------------------------------|
    | state     | the surveys of all calls, merged over all ranks                                    |
    | calls     | the number of calls that all ranks together replayed, the same number as in `last` |
    | last      | the numbers of calls and of prompts of the whole replay                            |
    | snapshots | a dict of snapshots of `state`, but with the surveys of this process alone         |
    """

    state: SurveyState
    calls: int
    last: CallCount
    snapshots: Mapping[CallCount, SurveyState]


def survey_inputs(model: nn.Module, calls: Calls, samples: int | None, plan: Plan, work: Work) -> SurveyResult:
    """Runs `model` on the first `samples` calls (None: all) with a survey of the input of each layer in `plan`.

    Collective: `work.ranks` share the calls. Raises MisfitError for a call that does not fit the model, and if there
    are no calls; NumbersError for an input that is not finite; DeviceError when memory runs out.
    """
    current = CurrentCall(model, work.ranks)
    surveys = {
        entry.name: PatchSurvey(current, entry.name, module)
        if isinstance(module, nn.Conv2d)
        else Survey(current, entry.name)
        for entry, module in named(model, plan)
    }

    def snapshot() -> SurveyState:
        call = copy.copy(current)
        return SurveyState(call, {name: survey.copy(call) for name, survey in surveys.items()})

    snapshots = Snapshots(snapshot)
    replayed = work.progress("survey", first(calls, samples), samples)
    count = observe(model, surveys, current.tracked(snapshots.taking(replayed)), work.ranks)
    return SurveyResult(
        merge_ranks(SurveyState(current, surveys), work.ranks), count, snapshots.last, snapshots.by_count
    )


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
