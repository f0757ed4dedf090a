"""From a float model and calls to a choice for each layer: survey, smoothing, ranges, weights."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from octavo.capture.errors import NumbersError
from octavo.capture.ranks import ALONE, Ranks

from .choice import Choice
from .layers.inputs import Dynamic
from .layers.scheme import Range
from .observers.patches import PatchSurvey
from .observers.ranges import edges_of, observed, spec_of
from .observers.survey import Survey
from .observers.survey_replay import united
from .plan import Plan, named
from .replay.calls import Calls, Progress, first, spread, taken
from .replay.current_call import Turn
from .replay.hooks import heard, observe
from .replay.marks import Mark, Marks, affordable
from .report import NEVER_RAN, ZERO_INPUT
from .resources import Stopwatch
from .rounding.choose_weights import compensated
from .rounding.sums import CALLS, ROOM
from .settings import Settings
from .smoothing.search import Smoothing, smooth

_WHOLE = torch.zeros(0)  # no edges: one bin
_MARKS = 3  # at most, that are measured: each takes a search of its own


class Choosing:
    """Chooses for every layer of the plan; afterwards `count` is how many calls there were, `last` the end of them,
    `summed` where those are that weights were rounded by.

    `room` tells the bytes that sums for rounding may take, when it comes to that.
    `timesteps`: the noise levels of the calls, descending, where ranges depend on them.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        plan: Plan,
        settings: Settings,
        progress: Progress,
        watch: Stopwatch,
        ranks: Ranks = ALONE,
        room: Callable[[], float] = lambda: ROOM,
    ) -> None:
        self._model, self._calls, self._plan, self._ranks = model, calls, plan, ranks
        self._settings, self._progress, self._watch, self._room = settings, progress, watch, room
        self.count = 0
        self.summed: set[int] = set()
        self.timesteps: tuple[float, ...] | None = None
        self.last = Mark(0, None)
        self._surveys_at: dict[Mark, tuple[Turn, dict[str, Survey]]] = {}  # what this rank knew on the way
        self._ranges_at: dict[Mark, dict[str, list[Range]]] = {}
        self._first_choices: dict[str, Choice] = {}
        self._silent: set[str] = set()  # layers that never ran, where no range says so

    def choices(self) -> tuple[dict[str, Choice], dict[str, list[Range]], dict[str, str]]:
        """The choices, the ranges of inputs, and the layers that have to stay float with the reason."""
        settings = self._settings
        surveys, turn = self._surveyed()
        smoothing: dict[str, Smoothing] = {}
        if settings.smoothing and settings.activations != "float":
            with self._watch.stage("smooth"):
                smoothing = self._smoothed(surveys)
        edges = edges_of(turn.levels) if settings.activations == "timestep" else _WHOLE
        if len(edges):
            self.timesteps = tuple(sorted(set(turn.levels), reverse=True))
        with self._watch.stage("replay"):
            ranges = self._ranges(surveys, smoothing, edges)
        choices, reasons = self._first(ranges, smoothing, edges)
        self._first_choices = dict(choices)
        if not settings.method.plain:
            positions = turn.training or list(range(turn.count))
            self.summed = {positions[at] for at in spread(len(positions), CALLS)}
            with self._watch.stage("weights"):
                usable = {name: each for name, each in surveys.items() if name in choices}
                choices |= compensated(
                    self._model,
                    {name: choices[name] for name in usable},
                    usable,
                    lambda: taken(self._calls, self.summed),
                    settings.method,
                    self._progress,
                    self._ranks,
                    self._room(),
                )
        return choices, ranges, reasons

    def earlier(self) -> dict[Mark, dict[str, Choice]]:
        """What the calls up to a mark would have chosen, as far as it is worth measuring, and what all of them did.

        Weights are rounded to the nearest in all of them. Nothing where later choices take another replay: what fewer
        calls would have come to is not known then.
        """
        settings = self._settings
        known = settings.activations != "float" and not settings.fallback and self.timesteps is None
        if settings.surveying:
            known = known and settings.observer == "minmax"
        found = {}
        for mark in affordable(
            self._surveys_at or self._ranges_at, self.count, settings.measured(self.count) if known else 0
        )[-_MARKS:]:
            found[mark] = self._chosen_by(mark)
        return found | {self.last: self._first_choices} if found else {}

    def _chosen_by(self, mark: Mark) -> dict[str, Choice]:
        """The choices that follow from what was known at a mark."""
        ranges, smoothing = self._ranges_at.get(mark, {}), {}
        if known := self._surveys_at.get(mark):
            _, surveys = united(*known, self._ranks)
            smoothing = self._smoothed(surveys) if self._settings.smoothing else {}
            ranges = ranges | _extremes(surveys, smoothing)
        return self._first(ranges, smoothing, _WHOLE)[0]

    def _smoothed(self, surveys: Mapping[str, Survey]) -> dict[str, Smoothing]:
        settings = self._settings
        kind = "dynamic" if settings.activations == "dynamic" else "static"
        groups = settings.groups(self._model) if settings.groups else []
        linears = _linears(surveys)
        return smooth(self._model, linears, groups, kind, settings.input_scheme, self._progress, self._ranks)

    def _surveyed(self) -> tuple[dict[str, Survey], Turn]:
        """The surveys of layers, if anything is to be chosen by them; of convolutions, if weights are."""
        turn, surveys = Turn(self._model, self._ranks), dict[str, Survey]()
        if not self._settings.surveying:
            return surveys, turn
        for entry, module in named(self._model, self._plan):
            if isinstance(module, nn.Linear):
                surveys[entry.name] = Survey(turn, entry.name)
            elif not self._settings.method.plain and self._settings.activations in ("static", "float"):
                surveys[entry.name] = PatchSurvey(turn, entry.name, module)

        def known() -> tuple[Turn, dict[str, Survey]]:
            now = copy.copy(turn)
            return now, {name: survey.copy(now) for name, survey in surveys.items()}

        marks = Marks(known)
        with self._watch.stage("survey"):
            samples = self._progress("survey", first(self._calls, self._settings.samples), self._settings.samples)
            self.count = observe(self._model, surveys, turn.each(marks.each(samples)), self._ranks)
            turn, surveys = united(turn, surveys, self._ranks)
        self._surveys_at, self.last = marks.taken, marks.last
        return surveys, turn

    def _ranges(
        self, surveys: Mapping[str, Survey], smoothing: Mapping[str, Smoothing], edges: torch.Tensor
    ) -> dict[str, list[Range]]:
        """The ranges of the inputs of layers that ran: from the surveys where they say it, else by another replay."""
        settings = self._settings
        ranges: dict[str, list[Range]] = {}
        if settings.activations in ("dynamic", "float"):
            if not surveys:
                self.count = sum(1 for _ in first(self._calls, settings.samples))
            unknown = {n for n in self._plan.quantized if n not in surveys or not surveys[n].seen}
            if self.count and unknown:
                some = first(self._calls, settings.samples)
                self._silent = unknown - heard(self._model, unknown, some, self._ranks)
            return ranges
        if settings.observer == "minmax" and not len(edges):
            ranges = _extremes(surveys, smoothing)
        silent = {name for name, survey in surveys.items() if not survey.seen}
        missing = [name for name in self._plan.quantized if name not in ranges and name not in silent]
        if missing:
            samples = self._progress("replay", first(self._calls, settings.samples), settings.samples)
            options = settings.options
            found, turn, marks = observed(
                self._model, missing, samples, settings.observer, options, smoothing, edges, self._ranks
            )
            ranges |= found
            self.count, self.last, self._ranges_at = turn.count, marks.last, marks.taken
        return ranges

    def _first(
        self, ranges: Mapping[str, list[Range]], smoothing: Mapping[str, Smoothing], edges: torch.Tensor
    ) -> tuple[dict[str, Choice], dict[str, str]]:
        """Choices with weights rounded to the nearest, and the layers that have none."""
        settings = self._settings
        choices, reasons = {}, {}
        for entry, module in named(self._model, self._plan):
            name, dtype = entry.name, module.weight.dtype
            multiplier = smoothing[name].multiplier if name in smoothing else None
            dynamic = settings.activations in ("dynamic", "float")
            if dynamic and name not in self._silent:
                choices[name] = Choice(Dynamic() if settings.activations == "dynamic" else None, multiplier)
            elif name not in ranges:
                if settings.strict:
                    raise NumbersError(f"layer {name}: saw no data. Keep it float or capture more.")
                reasons[name] = NEVER_RAN
            elif all(each == (0.0, 0.0) for each in ranges[name]):
                reasons[name] = ZERO_INPUT
            else:
                spec = spec_of(ranges[name], edges, settings.input_scheme, dtype)
                if spec is None:
                    reasons[name] = f"{str(dtype).removeprefix('torch.')} holds no scale for its input range"
                else:
                    choices[name] = Choice(spec, multiplier)
        return choices, reasons


def _linears(surveys: Mapping[str, Survey]) -> dict[str, Survey]:
    """Those of them that heard whole inputs."""
    return {name: survey for name, survey in surveys.items() if not isinstance(survey, PatchSurvey)}


def _extremes(surveys: Mapping[str, Survey], smoothing: Mapping[str, Smoothing]) -> dict[str, list[Range]]:
    """The range of each linear's input that was seen, smoothed."""
    found = {}
    for name, survey in _linears(surveys).items():
        if survey.seen:
            found[name] = [survey.all.range(smoothing[name].multiplier if name in smoothing else None)]
    return found
