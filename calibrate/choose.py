"""Finds a choice for each layer of a float model from calls: survey, smoothing, ranges, weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .choice import Choice
from .layers.transforms import Transform
from .observers.patches import PatchSurvey
from .observers.ranges import ONE_BIN, Bins, Ranges, bins_for, input_with, observe_ranges
from .observers.survey import Survey
from .observers.survey_replay import SurveyResult, SurveyState, survey_inputs
from .plan import Plan, named
from .replay.calls import Calls, first, spread, taken
from .replay.current_call import CurrentCall
from .replay.hooks import layers_called
from .replay.marks import Mark
from .replay.work import Work
from .report import NEVER_RAN, ZERO_INPUT
from .rounding.choose_weights import choose_weights
from .rounding.sums import CALLS, SUMS_BYTES
from .settings import Settings
from .smoothing.search import smooth


class Seen(NamedTuple):
    """The findings of the replays: the ranges of layer inputs, and `current`, the state at the end of the calls.

    `silent`: layers that never ran, where no range says so. `last`: the end of the calls.
    """

    ranges: Ranges
    silent: frozenset[str]
    current: CurrentCall
    last: Mark
    at_marks: Mapping[Mark, Ranges]

    @property
    def calls(self) -> int:
        """The number of calls."""
        return self.current.count


@dataclass(frozen=True)
class Chosen:
    """The choices for the layers of a plan, and the observations behind them.

    | field     | meaning                                                                                   |
    |-----------|-------------------------------------------------------------------------------------------|
    | choices   | by layer                                                                                  |
    | reasons   | layers that have to stay float, and why                                                   |
    | nearest   | the choices before weights were rounded by a method: to the nearest                       |
    | seen      | ranges of inputs, and how many calls there were                                           |
    | survey    | a closer look at inputs, where there was one                                              |
    | summed    | positions of the calls that weights were rounded by                                       |
    | timesteps | the noise levels of the calls, descending, where ranges depend on them                    |
    """

    choices: dict[str, Choice]
    reasons: dict[str, str]
    nearest: dict[str, Choice]
    seen: Seen
    survey: SurveyResult | None = None
    summed: frozenset[int] = frozenset()
    timesteps: tuple[float, ...] | None = None


def choose(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    room: Callable[[], float] = lambda: SUMS_BYTES,
) -> Chosen:
    """Makes the choice for every layer of the plan. `room` is asked, before weights are rounded, for the bytes that the
    sums may take.

    Collective: the ranks of `work` share the calls and the layers. Raises NumbersError for a layer that never ran, when
    `settings.strict`, and what the stages raise.
    """
    survey = None
    if settings.surveying:
        with work.watch.stage("survey"):
            survey = _survey(model, calls, plan, settings, work)
    current, surveys = survey.state if survey else SurveyState(CurrentCall(model, work.ranks), {})
    transforms: dict[str, Transform] = {}
    if settings.transforming:
        with work.watch.stage("smooth"):
            transforms = transforms_of(model, surveys, settings, work)
    bins = bins_for(current.levels, current.units) if settings.input_type.by_level else ONE_BIN
    with work.watch.stage("replay"):
        seen = _seen(model, calls, plan, settings, work, survey, transforms, bins)
    nearest, reasons = nearest_choices(model, plan, settings, seen, transforms, bins.edges)
    choices, summed = dict(nearest), frozenset[int]()
    if not settings.method.plain:
        positions = current.training or list(range(current.count))
        summed = frozenset(positions[index] for index in spread(len(positions), CALLS))
        with work.watch.stage("weights"):
            surveys = {name: each for name, each in surveys.items() if name in choices}
            usable = {name: choices[name] for name in surveys}
            choices |= choose_weights(
                model, usable, surveys, lambda: taken(calls, summed), settings.method, work, room()
            )
    levels = tuple(sorted(set(current.levels.values()), reverse=True)) if len(bins.edges) else None
    return Chosen(choices, reasons, nearest, seen, survey, summed, levels)


def _survey(model: nn.Module, calls: Calls, plan: Plan, settings: Settings, work: Work) -> SurveyResult:
    convolutions = not settings.method.plain and settings.input_type.by_patch
    ends = settings.observer == "minmax" and settings.input_type.ranged and not settings.input_type.by_level
    options = settings.options if ends else None
    return survey_inputs(model, calls, settings.samples, plan, work, convolutions=convolutions, options=options)


def transforms_of(
    model: nn.Module, surveys: Mapping[str, Survey], settings: Settings, work: Work
) -> dict[str, Transform]:
    """The transforms of the inputs of surveyed layers: those of smoothing, for layers that gain by it."""
    if not settings.transforming:
        return {}
    groups = settings.groups(model) if settings.groups else []
    found = smooth(model, _of_linears(surveys), groups, settings.input_type, settings.input_scheme, work)
    return {name: smoothing.transform for name, smoothing in found.items()}


def extremes(surveys: Mapping[str, Survey], transforms: Mapping[str, Transform]) -> Ranges:
    """The range of each linear's input that was seen, after its transform, where the survey can tell that range."""
    return {
        name: [survey.all.range(transform)]
        for name, survey in _of_linears(surveys).items()
        if survey.has_input and ((transform := transforms.get(name)) is None or transform.by_channel)
    }


def _of_linears(surveys: Mapping[str, Survey]) -> dict[str, Survey]:
    """The surveys that observed whole inputs, not patches."""
    return {name: survey for name, survey in surveys.items() if not isinstance(survey, PatchSurvey)}


def _seen(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    survey: SurveyResult | None,
    transforms: Mapping[str, Transform],
    bins: Bins,
) -> Seen:
    """The ranges of the inputs of layers that ran: from the surveys where these suffice, else by another replay."""
    surveys, last = (survey.state.surveys, survey.last) if survey else ({}, Mark(0, None))
    current = survey.state.current if survey else CurrentCall(model, work.ranks)
    if not settings.input_type.ranged:
        if not survey:
            for _ in current.each(first(calls, settings.samples)):
                pass
            current = current.shared()
        count = current.count
        silent = {name for name in plan.quantized if name not in surveys or not surveys[name].has_input}
        if count and silent:
            silent -= layers_called(model, silent, first(calls, settings.samples), work.ranks)
        return Seen({}, frozenset(silent) if count else frozenset(), current, last, {})
    ranges = extremes(surveys, transforms) if settings.observer == "minmax" and not len(bins.edges) else {}
    never = {name for name, each in surveys.items() if not each.has_input}
    if survey is not None:
        ranges, never = ranges | survey.ranges, never | survey.silent
    missing = [name for name in plan.quantized if name not in ranges and name not in never]
    if not missing:
        return Seen(ranges, frozenset(), current, last, survey.ranges_at_marks if survey else {})
    shown = work.progress("replay", first(calls, settings.samples), settings.samples)
    found, current, marks = observe_ranges(
        model, missing, shown, settings.observer, settings.options, transforms, bins, work.ranks
    )
    return Seen(ranges | found, frozenset(), current, marks.last, marks.taken)


def nearest_choices(
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    seen: Seen,
    transforms: Mapping[str, Transform],
    edges: Tensor = ONE_BIN.edges,
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Choices with weights rounded to the nearest, and the reasons of the layers without a choice."""
    choices, reasons = {}, {}
    for entry, module in named(model, plan):
        name, dtype = entry.name, module.weight.dtype
        ranges = seen.ranges.get(name)
        if not settings.input_type.ranged and name not in seen.silent:
            choices[name] = Choice(settings.input_type(scheme=settings.input_scheme), transforms.get(name))
        elif ranges is None:
            if settings.strict:
                raise NumbersError(f"layer {name}: saw no data. Keep it float or capture more.")
            reasons[name] = NEVER_RAN
        elif all(each == (0.0, 0.0) for each in ranges):
            reasons[name] = ZERO_INPUT
        else:
            input = input_with(ranges, edges, settings.input_scheme, dtype)
            if input is None:
                reasons[name] = f"{str(dtype).removeprefix('torch.')} holds no scale for its input range"
            else:
                choices[name] = Choice(input, transforms.get(name))
    return choices, reasons
