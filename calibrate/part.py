"""Calibrates a part of a model, which is all of its layers or those of one block: replays the calls, chooses the
integers of each layer, makes the integer layers, and measures their errors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .choice import Choice, layer_of
from .choose import Selection, choose
from .error_causes import ErrorCauses, Records
from .guard import lost_layers
from .layers.modules import QuantizedLayer
from .layers.weights import check_finite
from .plan import Plan, layer_at, make_plan, named, reasons_of
from .replay.calls import Call, Calls, Progress, calls_at
from .replay.hooks import axes
from .replay.measured_calls import measured_calls
from .replay.sqnr import Power, comparing, joined, outputs
from .replay.work import Work
from .rounding.sums import SUMS_BYTES
from .settings import Settings
from .smoothing.fold import with_multipliers


@dataclass(frozen=True)
class Part:
    """The result of calibrating a part of a model: all of its layers, or those of one block.

    | field     | meaning                                                                                              |
    |-----------|------------------------------------------------------------------------------------------------------|
    | plan      | the plan, in which layers that could not become integers stay float                                  |
    | selection | what `choose` returned: choices without regard to a budget, and the observations behind them         |
    | choices   | dict from layer name to the choice that is used; differs from `selection.choices` with a budget      |
    | layers    | dict from layer name to integer layer; empty if the layers are not to be kept in memory              |
    | makers    | dict from layer name to a function that returns the integer layer, made anew if not in `layers`      |
    | positions | positions of the measured calls among all calls                                                      |
    | measured  | function that iterates over the measured calls                                                       |
    | powers    | dict from layer name to signal and noise of the layer's output over the measured calls               |
    | axes      | dict from layer name to the number of axes of the layer's input, 0 where calls differ                |
    | exact     | the float model's outputs for the measured calls of this rank                                        |
    | causes    | the causes of the layers' errors; None without `settings.explain`                                    |
    | records   | the sums of `causes` over all ranks; empty without `settings.explain`                                |
    """

    plan: Plan
    selection: Selection
    choices: dict[str, Choice]
    layers: dict[str, QuantizedLayer]
    makers: Mapping[str, Callable[[], QuantizedLayer]]
    positions: list[int]
    measured: Callable[[], Iterator[Call]]
    powers: dict[str, Power]
    axes: dict[str, int]
    exact: list[list[Tensor]]
    causes: ErrorCauses | None
    records: Records


def calibrate_part(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    *,
    keep_layers: bool,
    sums_memory: Callable[[], float] = lambda: SUMS_BYTES,
    mix: Callable[[Plan, dict[str, Choice]], tuple[Plan, dict[str, Choice]]] | None = None,
    announce: Callable[[frozenset[int]], None] = lambda positions: None,
) -> Part:
    """Chooses the integers of the layers of `plan`, and measures the error of each integer layer's output against that
    of its float layer. `work` holds the progress display and the ranks that take part.

    `keep_layers`: whether all integer layers stay in memory; otherwise each is made anew when it is needed. A rounding
    method adds up statistics over the calls; `sums_memory` returns how many bytes these sums may take. `mix`, if given,
    gets the plan and the choices, and returns another plan and other choices, from which the integer layers are then
    made. `announce` is called with the positions, among all calls, of the calls that this rank runs for rounding and
    for measuring.
    """
    chosen = choose(model, calls, plan, settings, work, sums_memory)
    plan, choices = plan.kept_float(lost_layers(chosen.guarded, settings)), chosen.choices
    if mix is not None:
        plan, choices = mix(plan, choices)
    with work.watch.stage("freeze"):
        plan, layers = frozen(model, plan, choices, chosen.reasons, work.progress, keep_layers=keep_layers)
        plan = without_multipliers(model, plan, choices, settings)
        layers = {name: layer for name, layer in layers.items() if name in plan.quantized}
    positions = measured_calls(chosen.observations.current, settings.measured(chosen.observations.calls))
    announce(chosen.summed.union(work.ranks.share(positions)))
    makers = {name: partial(_integer_layer, model, name, choices, layers) for name in plan.quantized}
    measured = partial(calls_at, calls, positions)
    causes = ErrorCauses(chosen.observations.current, positions, work) if settings.explain else None
    powers, counts, exact = _compared(model, makers, measured(), len(positions), causes, work)
    records = causes.joined() if causes else {}
    return Part(plan, chosen, choices, layers, makers, positions, measured, powers, counts, exact, causes, records)


def _compared(
    model: nn.Module,
    makers: Mapping[str, Callable[[], QuantizedLayer]],
    calls: Iterator[Call],
    count: int,
    causes: ErrorCauses | None,
    work: Work,
) -> tuple[dict[str, Power], dict[str, int], list[list[Tensor]]]:
    """Runs the float `model` on the `count` measured `calls`, and compares each layer with the integer layer that
    `makers` makes. Returns the fields `powers`, `axes` and `exact` of Part. Adds up the `causes` of the errors, if not
    None."""
    with (
        work.watch.stage("measure"),
        comparing(model, makers, causes.add if causes else None) as powers,
        axes(model, list(makers)) as counts,
    ):
        shown = work.progress("measure", causes.tracked(calls) if causes else calls, count)
        exact = outputs(model, shown, work.ranks)
    return joined(powers, work.ranks), counts, exact


def planned(model: nn.Module, settings: Settings) -> Plan:
    """Returns the plan for `model` that follows from the settings: which layers become integers, and why the others
    stay float."""
    plan = make_plan(
        model, scheme=settings.scheme, keep_float=settings.keep_float, defaults=settings.defaults,
        more=settings.more_float, quantize=settings.quantize, option=settings.name,
    )  # fmt: skip
    block = settings.input_scheme.block
    if block is None:
        return plan
    unfit = {}
    for entry, module in named(model, plan):
        if isinstance(module, nn.Conv2d):
            unfit[entry.name] = f"a convolution, which {settings.element} cannot hold"
        elif module.weight.shape[1] % block:
            unfit[entry.name] = f"its {module.weight.shape[1]} inputs are no multiple of {block}"
    return plan.forced_float(unfit)


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Raises NumbersError if a layer that becomes integers in `plan` has a weight or bias with NaN or Inf."""
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
    keep_layers: bool,
) -> tuple[Plan, dict[str, QuantizedLayer]]:
    """Makes the integer layer of each layer of `plan` once, from its choice in `choices`: how the input becomes codes,
    the smoothing, the weight and the bias correction. Two kinds of layers stay float: those in `reasons`, a dict from
    layer name to the reason, and those whose integer layer cannot be made. Returns the plan in which these layers stay
    float, and a dict from name to integer layer. The dict is empty if `keep_layers` is False."""
    all_reasons, layers = dict(reasons), {}
    for entry, module in progress("freeze", named(model, plan), len(plan.quantized)):
        if entry.name in all_reasons:
            continue
        layer = layer_of(module, choices[entry.name])
        if isinstance(layer, str):
            all_reasons[entry.name] = layer
        elif keep_layers:
            layers[entry.name] = layer
    return plan.forced_float(all_reasons), layers


def without_multipliers(model: nn.Module, plan: Plan, choices: Mapping[str, Choice], settings: Settings) -> Plan:
    """Returns the plan in which a layer stays float if its smoothing factors cannot be folded, for example because
    another layer of its smoothing group stays float. If `settings.multipliers` is True, `plan` itself is returned,
    because a layer may then multiply its input by its factors at run time."""
    if settings.multipliers or not settings.smoothing:
        return plan
    transforms = {name: choices[name].transform for name in plan.quantized}
    left = with_multipliers(model, transforms, settings.fold_groups(model, plan.quantized))
    return plan.forced_float(dict.fromkeys(left, "its smoothing factors cannot be folded"))


def check_any_quantized(plan: Plan) -> None:
    """Raises NumbersError for a plan without a quantized layer, with the reasons why its layers stay float."""
    if not plan.quantized:
        reasons = reasons_of(entry for entry in plan.entries if entry.forced)
        raise NumbersError(f"no layer can become integers ({reasons}). Calibrate on more calls, or in another dtype.")


def _integer_layer(
    model: nn.Module, name: str, choices: Mapping[str, Choice], layers: Mapping[str, QuantizedLayer]
) -> QuantizedLayer:
    if name in layers:
        return layers[name]
    layer = layer_of(layer_at(model, name), choices[name])
    assert not isinstance(layer, str)
    return layer
