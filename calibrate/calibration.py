"""Calibrates a whole model: prepares it, chooses the integers, measures the result, writes the report."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.paging import page_out
from octavo.capture.ranks import ALONE, Ranks

from . import advice
from .attention.choice import attention_section
from .attention.measure import AttentionRow, attention_errors
from .choice import Choice
from .error_causes import causes_section
from .layers.install import install, quantized
from .layers.modules import QuantizedLayer
from .learning_curve import learning_curve
from .mixed_precision.budget import SEARCH, Search
from .mixed_precision.mix import Mixture, mixed
from .mixed_precision.sensitivity import Trajectory
from .part import Part, calibrate_part, check_any_quantized, check_weights, planned, without_multipliers
from .plan import Plan, layer_at
from .preparation.batch_norms import FoldedModel, fold_norms
from .preparation.dtype_casts import layers_with_cast_inputs
from .preparation.weight_reads import weights_used_elsewhere
from .replay.calls import Calls, Progress, evenly_spaced, first, silent
from .replay.sqnr import Power, outputs, powers_of, total
from .replay.work import Work
from .report import Findings, report_of, with_mixture
from .result import Result
from .settings import DEFAULTS, Settings
from .smoothing.fold import fold, temporary_values

_ATTENTION_CALLS = 4  # most calls on which the error of quantized attention is measured

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
    """Calibrates `model` on `calls`, a function that returns an iterable over all calls each time it is called.

    With `settings.budget`, each layer gets a scheme of its own, chosen by the error of the pipeline's final latents.
    `trajectory` runs the pipeline that `model` is part of and returns the latents; `search` limits how often it runs.
    Each of `ranks`, the processes that share the work, passes the same arguments and gets what a single process would,
    except for seconds and memory. With `settings.release`, integer layers replace the float layers of `model`.

    Raises UsageError for invalid settings or a budget without `trajectory`; FileError for a module name that no
    checkpoint can hold; MisfitError if calls are missing or do not fit; NumbersError for NaN or Inf in weights, inputs
    or outputs, if all layers stay float, or a layer never ran (`settings.strict`); DeviceError if memory runs out.
    """
    work = Work(progress, ranks)
    with work.watch.stage("prepare"):
        plan = planned(model, settings)
        check_weights(model, plan)
        for call in first(calls, 1):  # a loop, because a stored call can only be read while its iterator is open
            plan = plan.forced_float(weights_used_elsewhere(model, call, plan.quantized))
    mixtures: list[Mixture] = []

    def mix(plan: Plan, choices: dict[str, Choice]) -> tuple[Plan, dict[str, Choice]]:
        with work.watch.stage("budget"):
            mixtures.append(_mixed(model, plan, choices, settings, trajectory, search, work))
        return mixtures[0].plan, mixtures[0].choices

    limited = settings.limits is not None
    part = calibrate_part(
        model, calls, plan, settings, work, mix=mix if limited else None, keep_layers=not settings.release
    )
    check_any_quantized(part.plan)
    return _finished(model, part, settings, mixtures, work)


def _finished(model: nn.Module, part: Part, settings: Settings, mixtures: Sequence[Mixture], work: Work) -> Result:
    fewer = _without_worst_layers(part.plan, part.powers, settings)
    plan = without_multipliers(model, fewer, part.choices, settings)
    layers = {name: layer for name, layer in part.layers.items() if name in plan.quantized}
    curve, shares, trial = list[dict[str, Any]](), dict[str, float](), None
    if not mixtures:
        with work.watch.stage("enough"):
            curve = learning_curve(model, plan, settings, part.selection, part.measured, part.exact, work)
        with work.watch.stage("advice"):
            shares, trial = advice.find(model, part, plan, settings, work)
    rows, attention = _attention(model, part, settings, work)
    # before integer layers take the place of the linear layers by which a family finds its groups
    groups = settings.fold_groups(model, tuple(plan.quantized)) if settings.fold else []
    if settings.release:
        with work.watch.stage("install"):
            layers = _released(model, plan.quantized, part.makers, work.progress)
    with work.watch.stage("advice"):
        tried = trial and advice.measure(model, {} if settings.release else layers, part, trial, work)
    layers, parameters = fold(model, layers, groups)
    if groups and settings.release:
        install(model, layers)
    with (
        work.watch.stage("measure"),
        quantized(model, {} if settings.release else layers),
        temporary_values(model, parameters),
    ):
        output = powers_of(part.exact, outputs(model, part.measured(), work.ranks), work.ranks)
    sqnr = total(output).checked().sqnr
    if curve and settings.method.plain and sqnr is not None:
        curve.append({**part.selection.observations.last._asdict(), "output_sqnr": sqnr})
    report = report_of(plan, layers, _findings(part, output), settings, work.watch) | {"enough": curve} | attention
    report = advice.with_advice(report, shares, tried, output)
    if part.causes:
        report["causes"] = causes_section(part.causes, part.records, plan)
    for mixture in mixtures:
        report = with_mixture(report, mixture)
    for warning in report["warnings"] if work.ranks.rank == 0 else ():
        logger.warning(warning)
    written = rows if settings.attention == "write" else ()
    return Result(plan, layers, report, part.selection.timesteps, None, part.axes, parameters, written)


def _attention(
    model: nn.Module, part: Part, settings: Settings, work: Work
) -> tuple[Sequence[AttentionRow], dict[str, Any]]:
    """Measures the error of quantized attention of the float `model`; returns the errors, and a dict with the entry
    `attention` of the report. Both are empty if `settings` do not ask for it. The calls are evenly spaced among the
    held-out measured calls, or among all if none is held out."""
    if settings.attention == "off":
        return (), {}
    among, held_out = part.selection.observations.current.held_out_or_all(part.positions)
    picked = {among[index] for index in evenly_spaced(len(among), _ATTENTION_CALLS)}
    with work.watch.stage("attention"):
        calls = (call for index, call in enumerate(part.measured()) if index in picked)
        rows = attention_errors(model, calls, ranks=work.ranks)
    return rows, {"attention": attention_section(rows, len(picked), held_out=len(picked) if held_out else 0)}


def _findings(part: Part, output: Sequence[Power]) -> Findings:
    """Returns the results of calibrating `part` for the report. `output`: signal and noise of the output in each
    measured call."""
    seen, guarded = part.selection.observations, part.selection.guarded
    held_out = seen.current.held_out_count(part.positions)
    return Findings(part.choices, seen.ranges, part.powers, seen.calls, output, held_out, guarded)


def _released(
    model: nn.Module, names: Sequence[str], makers: Mapping[str, Callable[[], QuantizedLayer]], progress: Progress
) -> dict[str, QuantizedLayer]:
    # each integer layer replaces its float layer before the next is made: the float layer is then freed
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
    """Chooses a scheme for each layer within the limits of `settings.budget`, by the error of the final latents that
    `trajectory` returns. `choices` are the layers' choices without a budget; `search` has the schemes to choose from
    and the number of pipeline runs, and `work` the processes that share the runs. Raises UsageError if `trajectory` is
    None."""
    assert settings.limits is not None
    if trajectory is None:
        raise UsageError(
            "budget: needs a function that runs the pipeline and returns its latents. Pass it as `trajectory`."
        )
    schemes = search.schemes or settings.mixture
    return mixed(model, plan, choices, settings.limits, replace(search, schemes=schemes), trajectory, work)


def _without_worst_layers(plan: Plan, powers: Mapping[str, Power], settings: Settings) -> Plan:
    """Returns a copy of `plan` in which N of the quantized layers stay float: those whose outputs have the largest mean
    squared errors. N is `settings.fallback`. `powers` is a dict from layer name to the signal and noise of the layer's
    output. Raises UsageError if no layer would be left to quantize."""
    if not settings.fallback:
        return plan
    order = sorted(plan.quantized, key=lambda name: (-powers[name].mean_square, name))
    worst = order[: settings.fallback]
    if len(worst) == len(order):
        raise UsageError(f"amp_num {settings.fallback}: keeps every layer float. Set amp_num to a smaller number.")
    return plan.kept_float({name: f"among the {len(worst)} layers with the largest output error" for name in worst})


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
    """Folds the batch norms of `model` into its convolutions, then calibrates. Returns the result, and the model that
    was calibrated: a copy of `model` if batch norms were folded and `changing` is False, otherwise `model` itself.

    `changing`: whether `model` itself may be changed. `graphs`: whether the result may be exported as an ONNX graph,
    which may multiply an input by 1 / scale where Octavo divides it by the scale. With `graphs`, and for every model
    with convolutions, input scales are chosen for which both give the same codes (layers/reciprocals.py).

    The report lists each folded batch norm with its convolution, and its warnings begin with `warnings`. The result's
    field `example` holds the first call, from which an ONNX graph can be traced.

    Raises the exceptions of `calibrate`, and UsageError if `model` has batch norms and cannot be copied.
    """
    norms, call = FoldedModel(model, ()), next(iter(calls()), None)
    if call is not None:
        names = planned(model, settings).quantized
        settings = settings.keeping(layers_with_cast_inputs(model, call, names))
        convolutions = any(isinstance(model.get_submodule(name), nn.Conv2d) for name in names)
        settings = replace(settings, reciprocal=graphs or convolutions)
        norms = fold_norms(model, call, changing=changing)
        model = norms.model
    all_warnings = [*warnings, *filter(None, [norms.warning])]
    for warning in all_warnings:
        logger.warning(warning)
    result = calibrate(model, calls, settings, progress=progress)
    pairs = [pair._asdict() for pair in norms.pairs]
    report = result.report | {"folded": pairs, "warnings": [*all_warnings, *result.warnings]}
    return replace(result, report=report, example=call), model
