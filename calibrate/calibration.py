"""Calibration from end to end: prepare, replay, freeze, measure."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from octavo.capture.errors import NumbersError, UsageError
from octavo.capture.paging import page_out
from octavo.capture.ranks import ALONE, Ranks

from .choice import Choice, layer_of
from .choose import Choosing
from .layers.install import install, quantized
from .layers.modules import QuantizedLayer
from .layers.weights import check_finite
from .learning_curve import curve
from .mixed_precision.mix import Mixture, mixed
from .mixed_precision.sensitivity import Trajectory
from .plan import Plan, layer_at, make_plan, named
from .preparation.batch_norms import Folded, folded
from .preparation.dtype_casts import cast_to
from .replay.calls import Calls, Progress, silent, spread, taken
from .replay.hooks import axes
from .replay.sqnr import Power, comparing, joined, outputs, power_of
from .report import report_of, with_mixture
from .resources import Stopwatch
from .result import Result
from .settings import DEFAULTS, SCHEMES, Settings

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    calls: Calls,
    settings: Settings = DEFAULTS,
    *,
    progress: Progress = silent,
    trajectory: Trajectory | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Calibrates `model` on `calls`, a function that gives the calls anew each time.

    `trajectory` runs the pipeline that `model` is part of, for `settings.budget`: see `mixed_precision.mix`.

    `ranks` are processes that call this alike, each with the model and all calls, and share the work: all of them
    return what one process would, its seconds and memory apart.

    The model's weights stay as they are, unless `settings.release`: then its layers are replaced by integer ones.

    Raises OctavoError with the exit codes of its stages: plan.make_plan, replay.observe, weights.check_finite; 6 for
    a layer that never ran when `settings.strict`.
    """
    watch = Stopwatch()
    with watch.stage("prepare"):
        plan = planned(model, settings)
        check_weights(model, plan)
    choosing = Choosing(model, calls, plan, settings, progress, watch, ranks)
    choices, ranges, reasons = choosing.choices()
    count = choosing.count
    mixture = None
    if settings.limits is not None:
        with watch.stage("budget"):
            mixture = _mixed(model, plan, choices, settings, trajectory, progress, ranks)
        plan, choices = mixture.plan, mixture.choices
    with watch.stage("freeze"):
        plan, layers = frozen(model, plan, choices, reasons, progress, hold=not settings.release)
    check_left(plan)
    makers = {name: partial(_maker, model, name, choices, layers) for name in plan.quantized}
    measured = settings.measured(count)
    chosen = partial(taken, calls, spread(count, measured))
    with watch.stage("measure"), comparing(model, makers) as powers, axes(model, plan.quantized) as found:
        exact = outputs(model, progress("measure", chosen(), measured), ranks)
    powers = joined(powers, ranks)
    plan = _fallen_back(plan, powers, settings)
    layers = {name: layer for name, layer in layers.items() if name in plan.quantized}
    enough: list[dict[str, Any]] = []
    if mixture is None:
        with watch.stage("enough"):
            enough = curve(model, plan.quantized, choosing.earlier(), chosen, exact, progress, ranks)
    if settings.release:
        with watch.stage("install"):
            layers = _released(model, plan.quantized, makers, progress)
    with watch.stage("measure"), quantized(model, {} if settings.release else layers):
        output = power_of(exact, outputs(model, chosen(), ranks), ranks)
    report = report_of(plan, layers, choices, ranges, settings, powers, output.sqnr, count, watch) | {"enough": enough}
    if mixture is not None:
        report = with_mixture(report, mixture)
    for warning in report["warnings"] if ranks.rank == 0 else ():
        logger.warning(warning)
    return Result(plan, layers, report, choosing.timesteps, axes=found)


def _released(
    model: nn.Module, names: Sequence[str], makers: Mapping[str, Callable[[], QuantizedLayer]], progress: Progress
) -> dict[str, QuantizedLayer]:
    """The integer layers, each put into the model before the next one is made, so that its float one can go."""
    layers = {}
    for name in progress("install", names, len(names)):
        weight = layer_at(model, name).weight
        layers[name] = makers[name]()
        install(model, {name: layers[name]})
        page_out(weight)
    return layers


def _mixed(
    model: nn.Module,
    plan: Plan,
    choices: Mapping[str, Choice],
    settings: Settings,
    trajectory: Trajectory | None,
    progress: Progress,
    ranks: Ranks,
) -> Mixture:
    assert settings.limits is not None
    if trajectory is None:
        raise UsageError("budget: needs runs of the pipeline to judge by. Pass trajectory.")
    first = SCHEMES[settings.activations]
    schemes = tuple(first if scheme == "W8A8" else scheme for scheme in settings.search.schemes)
    search = replace(settings.search, schemes=schemes)
    return mixed(model, plan, choices, settings.limits, search, trajectory, progress, ranks)


def planned(model: nn.Module, settings: Settings) -> Plan:
    """The plan that the settings ask for."""
    scheme = SCHEMES[settings.activations]
    return make_plan(
        model, scheme=scheme, keep_float=settings.keep_float, defaults=settings.defaults, more=settings.more_float,
        quantize=settings.quantize, option=settings.name,
    )  # fmt: skip


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Raises NumbersError for a layer of the plan with numbers that are not finite."""
    for entry, module in named(model, plan):
        check_finite(f"{entry.name}.weight", module.weight)
        if module.bias is not None:
            check_finite(f"{entry.name}.bias", module.bias)


def frozen(
    model: nn.Module,
    plan: Plan,
    choices: Mapping[str, Choice],
    reasons: Mapping[str, str],
    progress: Progress,
    *,
    hold: bool,
) -> tuple[Plan, dict[str, QuantizedLayer]]:
    """The plan without the layers that have to stay float, and the layers; none where they are not to `hold`, but to be
    made one by one."""
    found, layers = dict(reasons), {}
    for entry, module in progress("freeze", named(model, plan), len(plan.quantized)):
        if entry.name in found:
            continue
        made = layer_of(module, choices[entry.name])
        if isinstance(made, str):
            found[entry.name] = made
        elif hold:
            layers[entry.name] = made
    return plan.forced_float(found), layers


def check_left(plan: Plan) -> None:
    """Raises NumbersError for a plan of which nothing is left to quantize, with the reason of the first layer."""
    if not plan.quantized:
        first = next(entry for entry in plan.entries if entry.forced)
        fact = f"{first.name}: {first.reason}; so it is with every layer"
        raise NumbersError(f"{fact}. Capture more or choose another dtype.")


def _maker(
    model: nn.Module, name: str, choices: Mapping[str, Choice], layers: Mapping[str, QuantizedLayer]
) -> QuantizedLayer:
    """The integer layer of that name; made anew where layers are not held beside the float ones."""
    if name in layers:
        return layers[name]
    made = layer_of(layer_at(model, name), choices[name])
    assert not isinstance(made, str)
    return made


def _fallen_back(plan: Plan, powers: Mapping[str, Power], settings: Settings) -> Plan:
    """The plan without the layers whose output has the largest mean squared error."""
    if not settings.fallback:
        return plan
    order = sorted(plan.quantized, key=lambda name: (-powers[name].mean_square, name))
    found = order[: settings.fallback]
    if len(found) == len(order):
        raise UsageError(f"amp_num {settings.fallback}: no layer is left to quantize. Give fewer.")
    return plan.kept_float({name: f"among the {len(found)} layers with the largest output error" for name in found})


logger = logging.getLogger(__name__)


def calibrate_folded(
    model: nn.Module,
    calls: Calls,
    settings: Settings = DEFAULTS,
    *,
    progress: Progress = silent,
    trajectory: Trajectory | None = None,
    changing: bool = False,
    warnings: Sequence[str] = (),
) -> tuple[Result, nn.Module]:
    """Calibrates as `calibrate` does after folding batch norms; returns also the model that the layers belong to:
    `model`, or a copy of it where batch norms were folded; with `changing` that is `model` too. The report lists the
    pairs under `folded`, and its warnings begin with `warnings`; the result has the first call.

    Raises what `calibrate` and `batch_norms.folded` do.
    """
    found, call = Folded(model, ()), next(iter(calls()), None)
    if call is not None:
        names = planned(model, settings).quantized
        settings = _kept(settings, cast_to(model, call, names))
        if any(isinstance(model.get_submodule(name), nn.Conv2d) for name in names):  # what graphs are made of
            settings = replace(settings, reciprocal=True)
        found = folded(model, call, changing=changing)
        model = found.model
    told = [*warnings, *filter(None, [found.warning])]
    for warning in told:
        logger.warning(warning)
    result = calibrate(model, calls, settings, progress=progress, trajectory=trajectory)
    pairs = [pair._asdict() for pair in found.pairs]
    report = result.report | {"folded": pairs, "warnings": [*told, *result.warnings]}
    return replace(result, report=report, example=call), model


def _kept(settings: Settings, reasons: Mapping[str, str]) -> Settings:
    """The settings by which the layers of `reasons` stay float too."""
    if settings.defaults is None:
        return replace(settings, more_float={**reasons, **settings.more_float})
    return replace(settings, defaults={**reasons, **settings.defaults})
