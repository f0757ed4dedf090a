"""Calibration of a whole model: prepare, choose, measure, report."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.paging import page_out
from octavo.capture.ranks import ALONE, Ranks

from .choice import Choice
from .layers.install import install, quantized
from .layers.modules import QuantizedLayer
from .learning_curve import learning_curve
from .mixed_precision.budget import SEARCH, Search
from .mixed_precision.mix import Mixture, mixed
from .mixed_precision.sensitivity import Trajectory
from .part import Part, calibrate_part, check_left, check_weights, planned
from .plan import Plan, layer_at
from .preparation.batch_norms import Folded, folded
from .preparation.dtype_casts import cast_to
from .preparation.weight_reads import weights_used_elsewhere
from .replay.calls import Calls, Progress, first, silent
from .replay.sqnr import Power, outputs, powers_of, total
from .replay.work import Work
from .report import Findings, report_of, with_mixture
from .result import Result
from .settings import DEFAULTS, Settings
from .smoothing.fold import fold, temporary_values

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    calls: Calls,
    settings: Settings = DEFAULTS,
    *,
    progress: Progress = silent,
    trajectory: Trajectory | None = None,
    search: Search = SEARCH,
    ranks: Ranks = ALONE,
) -> Result:
    """Calibrates `model` on `calls`, a function that gives the calls anew each time.

    `trajectory` runs the pipeline that `model` is part of, for `settings.budget`, within the limits of `search`: see
    `mixed_precision.mix`. `ranks` are processes that call this alike, each with the model and all calls, and share the
    work: all of them return what one process would, its seconds and memory apart.

    The model's weights stay as they are, unless `settings.release`: then its layers are replaced by integer ones.

    Raises the errors of its stages: plan.make_plan, replay.hooks.observe, layers.weights.check_finite; NumbersError for
    a layer that never ran when `settings.strict`.
    """
    work = Work(progress, ranks)
    with work.watch.stage("prepare"):
        plan = planned(model, settings)
        check_weights(model, plan)
        for call in first(calls, 1):  # a stored call can be read while its iterator is open
            plan = plan.forced_float(weights_used_elsewhere(model, call, plan.quantized))
    mixtures: list[Mixture] = []

    def mix(plan: Plan, choices: dict[str, Choice]) -> tuple[Plan, dict[str, Choice]]:
        with work.watch.stage("budget"):
            mixtures.append(_mixed(model, plan, choices, settings, trajectory, search, work))
        return mixtures[0].plan, mixtures[0].choices

    limited = settings.limits is not None
    part = calibrate_part(model, calls, plan, settings, work, mix=mix if limited else None, hold=not settings.release)
    check_left(part.plan)
    return _finished(model, part, settings, mixtures, work)


def _finished(model: nn.Module, part: Part, settings: Settings, mixtures: Sequence[Mixture], work: Work) -> Result:
    """Measures the model with the integer layers and reports; a mixture of schemes has no learning curve."""
    plan = _fallen_back(part.plan, part.powers, settings)
    layers = {name: layer for name, layer in part.layers.items() if name in plan.quantized}
    curve: list[dict[str, Any]] = []
    if not mixtures:
        with work.watch.stage("enough"):
            curve = learning_curve(model, plan, settings, part.chosen, part.measured, part.exact, work)
    if settings.release:
        with work.watch.stage("install"):
            layers = _released(model, plan.quantized, part.makers, work.progress)
    parameters: Mapping[str, Callable[[], Tensor]] = {}
    if settings.fold and settings.groups is not None:
        layers, parameters = fold(model, layers, settings.groups(model))
        if settings.release:
            install(model, layers)
    with (
        work.watch.stage("measure"),
        quantized(model, {} if settings.release else layers),
        temporary_values(model, parameters),
    ):
        output = powers_of(part.exact, outputs(model, part.measured(), work.ranks), work.ranks)
    sqnr = total(output).checked().sqnr
    if curve and settings.method.plain and sqnr is not None:
        curve.append({**part.chosen.seen.last._asdict(), "output_sqnr": sqnr})
    held = part.chosen.seen.current.held_of(part.positions)
    findings = Findings(part.choices, part.chosen.seen.ranges, part.powers, part.chosen.seen.calls, output, held)
    report = report_of(plan, layers, findings, settings, work.watch) | {"enough": curve}
    for mixture in mixtures:
        report = with_mixture(report, mixture)
    for warning in report["warnings"] if work.ranks.rank == 0 else ():
        logger.warning(warning)
    return Result(plan, layers, report, part.chosen.timesteps, axes=part.axes, parameters=parameters)


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
    search: Search,
    work: Work,
) -> Mixture:
    assert settings.limits is not None
    if trajectory is None:
        raise UsageError("budget: needs runs of the pipeline to judge by. Pass trajectory.")
    inputs = tuple(settings.input_type if kind.ranged else kind for kind in search.inputs)
    return mixed(model, plan, choices, settings.limits, replace(search, inputs=inputs), trajectory, work)


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
    changing: bool = False,
    graphs: bool = False,
    warnings: Sequence[str] = (),
) -> tuple[Result, nn.Module]:
    """Calibrates as `calibrate` does after folding batch norms; returns also the model that the layers belong to.

    That is `model`, or a copy of it where batch norms were folded; with `changing` it is `model` too. Models with
    integer convolutions, and others with `graphs`, may become graphs that multiply by the reciprocal of an input's
    scale: their scales are such that this makes the same codes (layers/reciprocals.py). The report lists the folded
    pairs, and its warnings begin with `warnings`; the result has the first call.

    Raises what `calibrate` and `batch_norms.folded` do.
    """
    found, call = Folded(model, ()), next(iter(calls()), None)
    if call is not None:
        names = planned(model, settings).quantized
        settings = _kept(settings, cast_to(model, call, names))
        convolutions = any(isinstance(model.get_submodule(name), nn.Conv2d) for name in names)
        settings = replace(settings, reciprocal=graphs or convolutions)
        found = folded(model, call, changing=changing)
        model = found.model
    told = [*warnings, *filter(None, [found.warning])]
    for warning in told:
        logger.warning(warning)
    result = calibrate(model, calls, settings, progress=progress)
    pairs = [pair._asdict() for pair in found.pairs]
    report = result.report | {"folded": pairs, "warnings": [*told, *result.warnings]}
    return replace(result, report=report, example=call), model


def _kept(settings: Settings, reasons: Mapping[str, str]) -> Settings:
    """The settings by which the layers of `reasons` stay float too."""
    if settings.defaults is None:
        return replace(settings, more_float={**reasons, **settings.more_float})
    return replace(settings, defaults={**reasons, **settings.defaults})
