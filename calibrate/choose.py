"""Chooses the integer form of each layer of a float model, in four stages: survey of the inputs, smoothing factors,
input ranges, integer weights."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .choice import Choice
from .guard import Guarded, guarded
from .layers.transforms import Transform, weight_for
from .observers.patches import PatchSurvey
from .observers.ranges import ONE_BIN, Bins, Ranges, bins_for, input_with, observe_ranges
from .observers.survey import Survey
from .observers.survey_replay import SurveyResult, SurveyState, survey_inputs
from .plan import Plan, layer_at, named
from .replay.calls import Calls, calls_at, evenly_spaced, first
from .replay.current_call import CurrentCall
from .replay.hooks import layers_called
from .replay.snapshots import CallCount
from .replay.work import Work
from .report import NEVER_RAN, ZERO_INPUT
from .rounding.choose_weights import choose_weights
from .rounding.sums import CALLS, SUMS_BYTES
from .settings import Settings
from .smoothing.search import ALPHAS, Smoothing, Tried, smooth


class Observations(NamedTuple):
    """Observations of the layers' inputs, made while the calls were replayed.

    `ranges`: a dict from layer name to the ranges of the layer's input, one for each timestep bin. `silent`: the layers
    that never ran; it is only filled for schemes without known ranges (dynamic, weight-only). `current`: holds the
    prompt and the noise level of every replayed call. `last`: how many calls and prompts were replayed. `snapshots`,
    for the learning curve: the `ranges` after the first 1, 2, 4, ... prompts, as a dict whose keys are the numbers of
    calls and prompts so far (CallCount).
    """

    ranges: Ranges
    silent: frozenset[str]
    current: CurrentCall
    last: CallCount
    snapshots: Mapping[CallCount, Ranges]

    @property
    def calls(self) -> int:
        """The number of calls replayed."""
        return self.current.count


@dataclass(frozen=True)
class Selection:
    """The choices for the layers of a plan, and the observations that they were made from.

    | field        | meaning                                                                                          |
    |--------------|--------------------------------------------------------------------------------------------------|
    | choices      | dict from layer name to choice                                                                   |
    | reasons      | layers that have to stay float: dict from layer name to the reason                               |
    | nearest      | `choices` as they were before a rounding method ran: all weights are rounded to the nearest      |
    | observations | ranges of the inputs, and the number of calls                                                    |
    | survey       | statistics of each input channel and sampled rows of the inputs; None where nothing needs them   |
    | summed       | positions of the calls over which the rounding method summed its statistics                      |
    | timesteps    | the noise levels of the calls, descending; None where ranges do not depend on the noise level    |
    | guarded      | what was done about the layers that their scheme would lose                                      |
    """

    choices: dict[str, Choice]
    reasons: dict[str, str]
    nearest: dict[str, Choice]
    observations: Observations
    survey: SurveyResult | None = None
    summed: frozenset[int] = frozenset()
    timesteps: tuple[float, ...] | None = None
    guarded: tuple[Guarded, ...] = ()


def choose(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    sums_memory: Callable[[], float] = lambda: SUMS_BYTES,
) -> Selection:
    """Chooses how each layer of the plan becomes integers. Weight rounding sums statistics over calls; `sums_memory`
    returns how many bytes these sums may take, and is called just before weights are rounded. The ranks of `work` (the
    processes of the run) share the calls and the layers, so each of them has to call this function.

    Raises MisfitError if there are no calls or a call does not fit the model; NumbersError for an input that is not
    finite and, with `settings.strict`, for a layer that never ran; DeviceError when memory runs out.
    """
    survey = None
    if settings.surveying:
        with work.watch.stage("survey"):
            survey = survey_inputs(model, calls, settings.samples, plan, work)
    current, surveys = survey.state if survey else SurveyState(CurrentCall(model, work.ranks), {})
    with work.watch.stage("smooth") if settings.transforming else nullcontext():
        smoothings = smoothings_of(model, surveys, settings, work)
    transforms = {name: smoothing.transform for name, smoothing in smoothings.items()}
    bins = bins_for(current.levels, current.units) if settings.input_type.by_level else ONE_BIN
    with work.watch.stage("replay"):
        observations = _observations(model, calls, plan, settings, work, survey, transforms, bins)
    observations = observations._replace(ranges=widened(observations.ranges, smoothings))
    nearest, reasons = nearest_choices(model, plan, settings, observations, transforms, bins.edges)
    choices, summed = dict(nearest), frozenset[int]()
    surveys = {name: survey for name, survey in surveys.items() if name in choices}
    if not settings.method.plain:
        positions = current.training or list(range(current.count))
        summed = frozenset(positions[index] for index in evenly_spaced(len(positions), CALLS))
        usable, some = {name: choices[name] for name in surveys}, partial(calls_at, calls, summed)
        with work.watch.stage("weights"):
            choices |= choose_weights(model, usable, surveys, some, settings.method, work, sums_memory())
    choices, rows = guarded(model, choices, _judging(surveys, settings), settings, work)
    levels = tuple(sorted(set(current.levels.values()), reverse=True)) if len(bins.edges) else None
    return Selection(choices, reasons, nearest, observations, survey, summed, levels, tuple(rows))


def _judging(surveys: Mapping[str, Survey], settings: Settings) -> dict[str, Survey]:
    """Returns those of `surveys` whose sampled rows can become codes on their own. The rows of a convolution are
    patches of its input, which cannot if a whole image has one dynamic scale, or if the scale depends on the noise
    level."""
    by_patch = settings.input_type.by_patch
    return {name: survey for name, survey in surveys.items() if by_patch or not isinstance(survey, PatchSurvey)}


def smoothings_of(
    model: nn.Module, surveys: Mapping[str, Survey], settings: Settings, work: Work
) -> dict[str, Smoothing]:
    """Searches for smoothing factors and rotations with `surveys`, a dict from layer name to the survey of the layer's
    input. Returns a dict from layer name to the transform of the layer's input, with only the layers whose output
    error the transform lowers. `work` holds the progress display and the ranks that take part."""
    if not settings.transforming:
        return {}
    groups = settings.fold_groups(model, surveys)
    alphas = ALPHAS if settings.smoothing else ()
    tried = Tried(alphas, settings.rotations, settings.multipliers, widened=settings.observer == "minmax")
    return smooth(model, surveys, groups, settings.input_type, settings.input_scheme, work, tried)


def extremes(surveys: Mapping[str, Survey], transforms: Mapping[str, Transform]) -> Ranges:
    """Returns a dict from layer name to the range of the layer's input after its transform, for the layers in
    `surveys`.

    Leaves out layers that received no input. Also leaves out layers whose transform mixes channels, because a survey
    only keeps the extremes of each channel, and these do not give the range of a mixture of channels.
    """
    return {
        name: [survey.all.range(transform)]
        for name, survey in surveys.items()
        if survey.has_input and ((transform := transforms.get(name)) is None or transform.by_channel)
    }


def widened(ranges: Ranges, smoothings: Mapping[str, Smoothing]) -> Ranges:
    """Returns a copy of `ranges` in which the ranges of a smoothed input are multiplied by its growth, so that they
    suit other prompts too."""
    growths = {name: smoothing.growth for name, smoothing in smoothings.items()}
    return {name: [extent.times(growths.get(name, 1.0)) for extent in extents] for name, extents in ranges.items()}


def _observations(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    survey: SurveyResult | None,
    transforms: Mapping[str, Transform],
    bins: Bins,
) -> Observations:
    """Returns the ranges of the layers' inputs after their transforms. A range that `survey` holds is taken from there
    (None: there was no survey). The other ranges are found in another replay, with an observer for each timestep bin in
    `bins`. `work` holds the progress display and the ranks that take part."""
    surveys, last = (survey.state.surveys, survey.last) if survey else ({}, CallCount(0, None))
    current = survey.state.current if survey else CurrentCall(model, work.ranks)
    if not settings.input_type.ranged:
        if not survey:
            for _ in current.tracked(first(calls, settings.samples)):
                pass
            current = current.shared()
        count = current.count
        silent = {name for name in plan.quantized if name not in surveys or not surveys[name].has_input}
        if count and silent:
            silent -= layers_called(model, silent, first(calls, settings.samples), work.ranks)
        return Observations({}, frozenset(silent) if count else frozenset(), current, last, {})
    ranges = extremes(surveys, transforms) if settings.observer == "minmax" and not len(bins.edges) else {}
    silent_layers = {name for name, survey_of_layer in surveys.items() if not survey_of_layer.has_input}
    missing = [name for name in plan.quantized if name not in ranges and name not in silent_layers]
    if not missing:
        return Observations(ranges, frozenset(), current, last, {})
    shown = work.progress("replay", first(calls, settings.samples), settings.samples)
    replayed, current, snapshots = observe_ranges(
        model, missing, shown, settings.observer, settings.options, transforms, bins, work.ranks
    )
    return Observations(ranges | replayed, frozenset(), current, snapshots.last, snapshots.by_count)


def nearest_choices(
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    observations: Observations,
    transforms: Mapping[str, Transform],
    edges: Tensor = ONE_BIN.edges,
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Returns two dicts by layer name. The first has the choice for each layer, with the weight rounded to the nearest,
    the range in `observations` and the transform in `transforms`. The second has, for each layer without a choice, the
    reason why the layer stays float. `edges`: the noise levels that separate the timestep bins, if ranges depend on the
    bin. With `settings.strict`, raises NumbersError for a layer that never ran."""
    choices, reasons = {}, {}
    for entry, module in named(model, plan):
        name, dtype = entry.name, module.weight.dtype
        ranges = observations.ranges.get(name)
        if not settings.input_type.ranged and name not in observations.silent:
            choices[name] = Choice(settings.input_type(scheme=settings.input_scheme), transforms.get(name))
        elif ranges is None:
            if settings.strict:
                raise NumbersError(f"layer {name}: {NEVER_RAN}. Keep it float or capture more calls.")
            reasons[name] = NEVER_RAN
        elif all(extent == (0.0, 0.0) for extent in ranges):
            reasons[name] = ZERO_INPUT
        else:
            input = input_with(ranges, edges, settings.input_scheme, dtype)
            if input is None:
                reasons[name] = f"{str(dtype).removeprefix('torch.')} cannot represent the scale of its input range"
            else:
                choices[name] = Choice(input, transforms.get(name))
    return choices | with_shared_scales(model, choices, settings), reasons


def with_shared_scales(model: nn.Module, choices: Mapping[str, Choice], settings: Settings) -> dict[str, Choice]:
    """Returns a dict from layer name to choice for those layers in `choices` that belong to a group of
    `settings.joined`, layers that a consumer joins into one matrix. The weights of a group get one scale, which covers
    the largest value in all of them."""
    shared = {}
    for group in settings.joined:
        names = [name for name in group if name in choices]
        weights = [weight_for(choices[name].transform, layer_at(model, name).weight.detach()) for name in names]
        largest = max((float(weight.abs().max()) for weight in weights), default=0.0)
        for name in names if largest else ():
            input = choices[name].input
            shared[name] = replace(choices[name], input=replace(input, scheme=replace(input.scheme, largest=largest)))
    return shared
