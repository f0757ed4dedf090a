"""Calibrates a part of a model, all layers or one block, from calls to integers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .choice import Choice, layer_of
from .choose import Chosen, choose
from .layers.inputs import WORDS
from .layers.modules import QuantizedLayer
from .layers.weights import check_finite
from .plan import Plan, layer_at, make_plan, named, reasons_of
from .replay.calls import Call, Calls, Progress, taken
from .replay.hooks import axes
from .replay.measured_calls import measured_calls
from .replay.sqnr import Power, comparing, joined, outputs
from .replay.work import Work
from .rounding.sums import SUMS_BYTES
from .settings import Settings


@dataclass(frozen=True)
class Part:
    """A plan whose layers became integers, and their measurements.

    `makers` give the integer layers by name, made anew each time where `layers` does not hold them. `exact`: the float
    model's outputs for the calls of `measured`. `axes`: the number of axes of each layer's input, 0 where it changes.
    """

    plan: Plan
    chosen: Chosen
    choices: dict[str, Choice]
    layers: dict[str, QuantizedLayer]
    makers: Mapping[str, Callable[[], QuantizedLayer]]
    positions: list[int]
    measured: Callable[[], Iterator[Call]]
    powers: dict[str, Power]
    axes: dict[str, int]
    exact: list[list[Tensor]]


def calibrate_part(
    model: nn.Module,
    calls: Calls,
    plan: Plan,
    settings: Settings,
    work: Work,
    *,
    hold: bool,
    room: Callable[[], float] = lambda: SUMS_BYTES,
    mix: Callable[[Plan, dict[str, Choice]], tuple[Plan, dict[str, Choice]]] | None = None,
    announce: Callable[[frozenset[int]], None] = lambda positions: None,
) -> Part:
    """Chooses the integers of the layers of a plan, and measures each layer beside its float form.

    `mix` may change plan and choices before layers are made. With `hold` all integer layers stay in memory; else each
    is made when asked for. `announce` receives the positions of all calls that were or will be run.
    """
    chosen = choose(model, calls, plan, settings, work, room)
    choices = chosen.choices
    if mix is not None:
        plan, choices = mix(plan, choices)
    with work.watch.stage("freeze"):
        plan, layers = frozen(model, plan, choices, chosen.reasons, work.progress, hold=hold)
    positions = measured_calls(chosen.seen.current, settings.measured(chosen.seen.calls))
    announce(chosen.summed.union(work.ranks.share(positions)))
    makers = {name: partial(_made, model, name, choices, layers) for name in plan.quantized}
    measured = partial(taken, calls, positions)
    with (
        work.watch.stage("measure"),
        comparing(model, makers) as powers,
        axes(model, plan.quantized) as counts,
    ):
        exact = outputs(model, work.progress("measure", measured(), len(positions)), work.ranks)
    return Part(plan, chosen, choices, layers, makers, positions, measured, joined(powers, work.ranks), counts, exact)


def planned(model: nn.Module, settings: Settings) -> Plan:
    """The plan that the settings ask for."""
    scheme = WORDS[settings.input_type]
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
    """The plan without the layers that have to stay float, and the integer layers; without `hold` none, since they are
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
    """Raises NumbersError for a plan with no layer left to quantize, with the reasons of its layers."""
    if not plan.quantized:
        why = reasons_of(entry for entry in plan.entries if entry.forced)
        raise NumbersError(f"no layer can become integers ({why}). Give more calls or choose another dtype.")


def _made(
    model: nn.Module, name: str, choices: Mapping[str, Choice], layers: Mapping[str, QuantizedLayer]
) -> QuantizedLayer:
    """The integer layer `name`, from `layers` or made anew."""
    if name in layers:
        return layers[name]
    made = layer_of(layer_at(model, name), choices[name])
    assert not isinstance(made, str)
    return made
