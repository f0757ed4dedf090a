"""Calibration from end to end: prepare, replay, freeze, measure."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .calls import Call, Calls, Progress, first, silent
from .errors import CalibrateError
from .freeze import freeze
from .layers import QuantizedLayer, build, install, quantized
from .observers import OBSERVERS, Options
from .plan import FloatLayer, Plan, layer_at, make_plan, named
from .replay import observe
from .report import NEVER_RAN, ZERO_INPUT, Stopwatch, report_of
from .rounding import WEIGHT_METHODS
from .scheme import ACTIVATION, SYMMETRIC_ACTIVATION, Range, qparams_of
from .sqnr import Power, comparing, outputs, spread
from .weights import check_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a calibration can be told."""

    observer: str = "minmax"  # a name of OBSERVERS
    sigma: float = 25.0  # of observer "sigma"; 0 means minimum and maximum
    percentile: float = 99.99  # of observer "percentile"
    symmetric: bool = False  # activations
    act_quant: bool = True  # False: weights only
    weights: str = "round-to-nearest"  # a name of WEIGHT_METHODS
    keep_float: tuple[str, ...] = ()  # patterns; each has to match a layer
    defaults: Mapping[str, str] | None = None  # patterns and reasons of a family of models; None: the general rule
    samples: int | None = None  # calls to replay; None: all
    sqnr_calls: int = 8  # calls to measure with, spread over those replayed; 0: none
    strict: bool = False  # a layer that never ran is an error
    release: bool = False  # the model is ours: its float layers are replaced one by one and let go
    name: str = "keep_float"  # what the user calls `keep_float`, for messages

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise CalibrateError(f"observer: no '{self.observer}'. Choose one of {', '.join(OBSERVERS)}.", 2)
        if self.weights not in WEIGHT_METHODS:
            raise CalibrateError(f"weights: no '{self.weights}'. Choose one of {', '.join(WEIGHT_METHODS)}.", 2)
        if not 0.0 <= self.sigma <= 100.0:
            raise CalibrateError(f"sigma: {self.sigma} is outside 0 to 100. Give a number in it.", 2)
        if not 50.0 < self.percentile <= 100.0:
            raise CalibrateError(f"percentile: {self.percentile} is outside 50 to 100. Give a number in it.", 2)
        if self.samples is not None and self.samples < 1:
            raise CalibrateError(f"samples: {self.samples} is less than 1. Give a positive number.", 2)


@dataclass(frozen=True)
class Result:
    """What a calibration made: the plan as it came out, the integer layers by name, report.json's content, and what the
    denoiser was called with, step by step, where that was asked for."""

    plan: Plan
    layers: dict[str, QuantizedLayer]
    report: dict[str, Any]
    timesteps: tuple[float, ...] | None = None

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one line each."""
        return list(self.report["warnings"])


def calibrate(
    model: nn.Module, calls: Calls, settings: Settings = Settings(), *, progress: Progress = silent
) -> Result:
    """Calibrates `model` on `calls`, a function that gives the calls anew each time.

    The model's weights stay as they are, unless `settings.release`: then its layers are replaced by integer ones.

    Raises CalibrateError with the exit codes of its stages: plan.make_plan, replay.observe, weights.check_finite; 6 for
    a layer that never ran when `settings.strict`.
    """
    watch = Stopwatch()
    with watch.stage("prepare"):
        plan = _prepared(model, settings)
    with watch.stage("replay"):
        ranges, count = _replay(model, calls, plan, settings, progress)
    with watch.stage("freeze"):
        plan, layers = _frozen(model, plan, ranges, settings, progress)
    chosen = partial(_chosen, calls, spread(count, settings.sqnr_calls))
    makers = {name: partial(_maker, model, name, ranges, settings, layers) for name in plan.quantized}
    with watch.stage("measure"), comparing(model, makers) as powers:
        exact = outputs(model, progress("measure", chosen(), settings.sqnr_calls))
    if settings.release:
        with watch.stage("install"):
            for name in progress("install", plan.quantized, len(plan.quantized)):
                layers[name] = makers[name]()
                install(model, {name: layers[name]})
    with watch.stage("measure"), quantized(model, {} if settings.release else layers):
        output = Power()
        for one, other in zip(exact, outputs(model, chosen()), strict=True):
            for exact_tensor, tensor in zip(one, other, strict=True):
                output.add(exact_tensor, tensor)
    report = report_of(
        plan, layers, settings, ranges, {n: p.sqnr for n, p in powers.items()}, output.sqnr, count, watch
    )
    for warning in report["warnings"]:
        logger.warning(warning)
    return Result(plan, layers, report)


def _prepared(model: nn.Module, settings: Settings) -> Plan:
    scheme = "W8A8" if settings.act_quant else "W8A16"
    plan = make_plan(
        model, scheme=scheme, keep_float=settings.keep_float, defaults=settings.defaults, option=settings.name
    )
    for entry, module in named(model, plan):
        check_finite(f"{entry.name}.weight", module.weight)
        if module.bias is not None:
            check_finite(f"{entry.name}.bias", module.bias)
    return plan


def _replay(
    model: nn.Module, calls: Calls, plan: Plan, settings: Settings, progress: Progress
) -> tuple[dict[str, Range], int]:
    """The range of every layer that ran, and how many calls there were."""
    samples = progress("replay", first(calls, settings.samples), settings.samples)
    if not settings.act_quant:
        return {}, sum(1 for _ in samples)
    scheme = SYMMETRIC_ACTIVATION if settings.symmetric else ACTIVATION
    options = Options(settings.sigma, settings.percentile, scheme)
    observers = {name: OBSERVERS[settings.observer](options) for name in plan.quantized}
    count = observe(model, observers, samples)
    ranges = {}
    for name, observer in observers.items():
        try:
            ranges[name] = observer.range()
        except ValueError:
            if settings.strict:
                raise CalibrateError(f"layer {name}: saw no data. Keep it float or capture more.", 6) from None
    return ranges, count


def _frozen(
    model: nn.Module, plan: Plan, ranges: Mapping[str, Range], settings: Settings, progress: Progress
) -> tuple[Plan, dict[str, QuantizedLayer]]:
    """The plan without the layers that have to stay float, and the layers unless they are to be made one by one."""
    reasons, layers = {}, {}
    for entry, module in progress("freeze", named(model, plan), len(plan.quantized)):
        made = _layer(module, ranges.get(entry.name), settings)
        if isinstance(made, str):
            reasons[entry.name] = made
        elif not settings.release:
            layers[entry.name] = made
    plan = plan.forced_float(reasons)
    if not plan.quantized:
        name, reason = next(iter(reasons.items()))
        raise CalibrateError(f"{name}: {reason}; so it is with every layer. Capture more or choose another dtype.", 6)
    return plan, layers


def _layer(module: FloatLayer, extent: Range | None, settings: Settings) -> QuantizedLayer | str:
    """The integer form of a float layer, or why it has none."""
    qparams = None
    weight = module.weight
    if settings.act_quant:
        if extent is None:
            return NEVER_RAN
        if extent == (0.0, 0.0):
            return ZERO_INPUT
        scheme = SYMMETRIC_ACTIVATION if settings.symmetric else ACTIVATION
        qparams = qparams_of(extent, scheme, weight.dtype)
        if qparams is None:
            return f"{str(weight.dtype).removeprefix('torch.')} holds no scale for its input range"
    numbers = freeze(weight, module.bias, qparams, settings.weights)
    return numbers if isinstance(numbers, str) else build(numbers, module)


def _maker(
    model: nn.Module, name: str, ranges: Mapping[str, Range], settings: Settings, layers: Mapping[str, QuantizedLayer]
) -> QuantizedLayer:
    """The integer layer of that name; made anew where layers are not held beside the float ones."""
    if name in layers:
        return layers[name]
    made = _layer(layer_at(model, name), ranges.get(name), settings)
    assert not isinstance(made, str)
    return made


def _chosen(calls: Calls, positions: list[int]) -> Iterator[Call]:
    wanted = set(positions)
    return (call for at, call in enumerate(itertools.islice(calls(), max(positions, default=-1) + 1)) if at in wanted)
