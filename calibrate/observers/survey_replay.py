"""A replay in which surveys observe the inputs of layers, and the surveys of several processes become one."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from octavo.capture.ranks import Ranks

from ..plan import Plan, named
from ..replay.calls import Calls, first
from ..replay.current_call import Turn
from ..replay.hooks import observe
from ..replay.marks import Mark, Marks
from ..replay.work import Work
from .patches import PatchSurvey
from .survey import Survey


class Known(NamedTuple):
    """The surveys by layer name, and the calls they observed."""

    turn: Turn
    surveys: dict[str, Survey]


class Surveyed(NamedTuple):
    """What one replay found out: `known` of all calls, and of this process at each mark; `last` is the end."""

    known: Known
    calls: int
    last: Mark
    at_marks: Mapping[Mark, Known]


def surveyed(
    model: nn.Module, calls: Calls, samples: int | None, plan: Plan, work: Work, *, convolutions: bool
) -> Surveyed:
    """Replays the first `samples` calls with a survey of each linear of the plan, and of `convolutions` if wanted.

    Collective: the ranks share the calls. Raises as `replay.hooks.observe` does.
    """
    turn, surveys = Turn(model, work.ranks), dict[str, Survey]()
    for entry, module in named(model, plan):
        if isinstance(module, nn.Linear):
            surveys[entry.name] = Survey(turn, entry.name)
        elif convolutions:
            surveys[entry.name] = PatchSurvey(turn, entry.name, module)

    def known() -> Known:
        now = copy.copy(turn)
        return Known(now, {name: survey.copy(now) for name, survey in surveys.items()})

    marks = Marks(known)
    shown = work.progress("survey", first(calls, samples), samples)
    count = observe(model, surveys, turn.each(marks.each(shown)), work.ranks)
    return Surveyed(united(Known(turn, surveys), work.ranks), count, marks.last, marks.taken)


def united(known: Known, ranks: Ranks) -> Known:
    """All that the ranks know of calls that they shared: as one process knows it that observed all of them. Collective.

    No more rows are moved than are kept of all.
    """
    turn, surveys = known
    sizes = ranks.gather({name: [sample.sizes() for sample in survey.samples] for name, survey in surveys.items()})
    for name, survey in surveys.items():
        for index, sample in enumerate(survey.samples):
            sample.thin([each[name][index] for each in sizes])
    bare = {name: survey.copy(None) for name, survey in surveys.items()}  # type: ignore[arg-type]
    parts = ranks.gather((turn.samples, turn.levels, bare))
    joined = turn.joined(sum(part[0] for part in parts), [level for part in parts for level in part[1]])
    merged = {name: survey.copy(joined) for name, survey in parts[0][2].items()}
    for _, _, others in parts[1:]:
        for name, survey in merged.items():
            survey.merge(others[name])
    return Known(joined, merged)
