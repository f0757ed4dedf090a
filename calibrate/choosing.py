"""From a float model and calls to a choice for each layer: survey, smoothing, ranges, weights."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .calls import Call, Calls, Progress, first
from .choice import Choice
from .compensate import CALLS, compensated
from .enough import Mark, Marks, affordable
from .errors import CalibrateError
from .freeze import Dynamic, InputSpec
from .plan import Plan, layer_at, named
from .ranges import edges_of, observed, spec_of
from .replay import observe
from .report import NEVER_RAN, ZERO_INPUT, Stopwatch
from .scheme import Range
from .settings import Settings
from .smoothing import Smoothing, smooth
from .sqnr import spread
from .survey import Survey, Turn

_WHOLE = torch.zeros(0)  # no edges: one bin


class Choosing:
    """Chooses for every layer of the plan; afterwards `count` is how many calls there were, `last` the end of them.

    `timesteps`: the noise levels of the calls, descending, where ranges depend on them.
    """

    def __init__(
        self, model: nn.Module, calls: Calls, plan: Plan, settings: Settings, progress: Progress, watch: Stopwatch
    ) -> None:
        self._model, self._calls, self._plan = model, calls, plan
        self._settings, self._progress, self._watch = settings, progress, watch
        self.count = 0
        self.timesteps: tuple[float, ...] | None = None
        self.last = Mark(0, None)
        self._earlier: dict[Mark, dict[str, list[Range]]] = {}  # ranges known on the way
        self._edges = _WHOLE

    def choices(self) -> tuple[dict[str, Choice], dict[str, list[Range]], dict[str, str]]:
        """The choices, the ranges of inputs, and the layers that have to stay float with the reason."""
        settings = self._settings
        surveys, turn, marks = self._surveyed()
        smoothing: dict[str, Smoothing] = {}
        if settings.smoothing and settings.activations != "float":
            with self._watch.stage("smooth"):
                kind = "dynamic" if settings.activations == "dynamic" else "static"
                groups = settings.groups(self._model) if settings.groups else []
                smoothing = smooth(self._model, surveys, groups, kind, settings.input_scheme, self._progress)
        self._edges = edges = edges_of(turn.levels) if settings.activations == "timestep" else _WHOLE
        if len(edges):
            self.timesteps = tuple(sorted(set(turn.levels), reverse=True))
        with self._watch.stage("replay"):
            ranges = self._ranges(surveys, smoothing, edges, marks)
        choices, reasons = self._first(ranges, smoothing, edges)
        if not settings.method.plain:
            with self._watch.stage("weights"):
                usable = {name: each for name, each in surveys.items() if name in choices}
                choices |= compensated(
                    self._model,
                    {name: choices[name] for name in usable},
                    usable,
                    lambda: self._some(turn),
                    settings.method,
                    self._progress,
                )
        return choices, ranges, reasons

    def earlier(self) -> dict[Mark, dict[str, InputSpec]]:
        """How inputs would become integers by the ranges known on the way, as far as it is worth measuring.

        Nothing where more than ranges is chosen by looking at calls: what fewer of them would have chosen is not known.
        """
        settings, found = self._settings, {}
        only_ranges = settings.method.plain and not (settings.smoothing or settings.fallback)
        measured = settings.sqnr_calls if only_ranges else 0
        for mark in affordable(self._earlier, self.count, measured):
            specs = {
                name: spec_of(ranges, self._edges, settings.input_scheme, layer_at(self._model, name).weight.dtype)
                for name, ranges in self._earlier[mark].items()
                if any(each != (0.0, 0.0) for each in ranges)
            }
            found[mark] = {name: spec for name, spec in specs.items() if spec is not None}
        return found

    def _surveyed(self) -> tuple[dict[str, Survey], Turn, Marks]:
        """The surveys of linears, if anything is to be chosen by them; and what they knew on the way."""
        turn, surveys = Turn(self._model), dict[str, Survey]()
        marks = Marks(lambda: {name: survey.all for name, survey in surveys.items() if survey.seen})
        if not self._settings.surveying:
            return surveys, turn, marks
        surveys |= {
            e.name: Survey(turn) for e, module in named(self._model, self._plan) if isinstance(module, nn.Linear)
        }
        with self._watch.stage("survey"):
            samples = self._progress("survey", first(self._calls, self._settings.samples), self._settings.samples)
            self.count = observe(self._model, surveys, turn.each(marks.each(samples)))
        return surveys, turn, marks

    def _ranges(
        self, surveys: Mapping[str, Survey], smoothing: Mapping[str, Smoothing], edges: torch.Tensor, marks: Marks
    ) -> dict[str, list[Range]]:
        """The ranges of the inputs of layers that ran: from the surveys where they say it, else by another replay."""
        settings = self._settings
        ranges: dict[str, list[Range]] = {}
        if settings.activations in ("dynamic", "float"):
            if not surveys:
                self.count = sum(1 for _ in first(self._calls, settings.samples))
            return ranges
        if settings.observer == "minmax" and not len(edges):
            multipliers = {name: smoothing[name].multiplier if name in smoothing else None for name in surveys}
            for name, survey in surveys.items():
                if survey.seen:
                    ranges[name] = [survey.all.range(multipliers[name])]
            for mark, known in marks.taken.items():
                self._earlier[mark] = {name: [channels.range(multipliers[name])] for name, channels in known.items()}
            self.last = marks.last
        silent = {name for name, survey in surveys.items() if not survey.seen}
        missing = [name for name in self._plan.quantized if name not in ranges and name not in silent]
        if missing:
            samples = self._progress("replay", first(self._calls, settings.samples), settings.samples)
            options = settings.options
            found, turn, marks = observed(self._model, missing, samples, settings.observer, options, smoothing, edges)
            ranges |= found
            self.count, self.last = turn.count, marks.last
            for mark, known in marks.taken.items():
                self._earlier.setdefault(mark, {}).update(known)
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
            if settings.activations in ("dynamic", "float"):
                choices[name] = Choice(Dynamic() if settings.activations == "dynamic" else None, multiplier)
                continue
            if name not in ranges:
                if settings.strict:
                    raise CalibrateError(f"layer {name}: saw no data. Keep it float or capture more.", 6)
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

    def _some(self, turn: Turn) -> Iterator[Call]:
        """Some of the calls that choices may look at."""
        positions = turn.training or list(range(turn.count))
        wanted = {positions[at] for at in spread(len(positions), CALLS)}
        return (call for at, call in enumerate(first(self._calls, self._settings.samples)) if at in wanted)
