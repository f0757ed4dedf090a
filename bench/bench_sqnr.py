"""Measures how far the printed output SQNR is from that over all calls, on the tiny pipelines of tests/zoo.

    python -m bench.bench_sqnr [NAME ...] [--prompts 4] [--steps 8] [--accuracy fast]

Each pipeline runs its prompts with as many steps; each denoiser is calibrated as the command would do it, and both
models run on all calls. A prompt is made from the pipeline's embeddings, mixed with noise of its own. A line for each
denoiser, then the quantiles of the distance, and how often the interval holds the SQNR over all calls. Which prompts
are held out, and which calls are measured, follows from the order of the prompts: the last line is over all orders.
"""

import argparse
import itertools
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.replay.measured_calls import MEASURED, measured_calls
from octavo.calibrate.replay.sqnr import Power, outputs, powers_of, total
from octavo.calibrate.settings import RECIPES, Settings
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines import family_of
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.load import quiet
from tests.zoo.pipelines import ZOO, make, run

from .accuracy import Call


class Row(NamedTuple):
    """The numbers of one denoiser: calls in all and measured, SQNR printed and over all calls in dB, its interval; the
    SQNR that would be printed for each order of the prompts."""

    name: str
    calls: int
    measured: int
    printed: float
    true: float
    extent: tuple[float, float] | None
    orders: list[float]


def of_prompt(arguments: dict[str, Any], unit: int, steps: int) -> dict[str, Any]:
    """The arguments for another prompt: embeddings are mixed with noise, a quarter of the energy, and stay as large."""
    generator = torch.Generator().manual_seed(unit)

    def varied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            return 0.75**0.5 * value + 0.5 * value.std() * noise
        return value

    made = {name: varied(value) if "embeds" in name else value for name, value in arguments.items()}
    return made | ({"num_inference_steps": steps} if "num_inference_steps" in made else {})


def recorded(pipe: Any, arguments: dict[str, Any], prompts: int, steps: int) -> dict[str, list[Call]]:
    """The calls of each denoiser of the pipeline, each with the number of its prompt."""
    calls: dict[str, list[Call]] = {}
    for unit in range(prompts):
        memories = {name: Memory() for name in denoisers(pipe)}
        with ExitStack() as stack:
            for name, module in denoisers(pipe).items():
                stack.enter_context(Recorder(module, memories[name]))
            run(pipe, of_prompt(arguments, unit, steps))
        for name, memory in memories.items():
            calls.setdefault(name, []).extend(Call(call.args, call.kwargs, unit, call.step) for call in memory.calls)
    return calls


def rows(name: str, prompts: int, steps: int, recipe: str) -> Iterator[Row]:
    """The rows of the denoisers of a pipeline."""
    pipe, arguments = make(name)
    family = family_of(type(pipe).__name__)
    known: dict[str, Any] = {"defaults": family.keep_float, "more_float": family.more_float, "groups": family.groups}
    for module in denoisers(pipe).values():
        module.requires_grad_(False)
    for component, calls in recorded(pipe, arguments, prompts, steps).items():
        module = denoisers(pipe)[component]
        if calls and (row := measured(f"{name}.{component}", module, calls, Settings(**known, **RECIPES[recipe]))):
            yield row


def measured(name: str, module: nn.Module, calls: list[Call], settings: Settings) -> Row | None:
    """The row of one denoiser; None where its integers make no error."""
    result = calibrate(module, lambda: calls, settings)
    exact = outputs(module, calls)
    with quantized(module, result.layers):
        powers = powers_of(exact, outputs(module, calls))
    totals, true = result.report["totals"], total(powers).sqnr
    if true is None or totals["output_sqnr"] is None:
        return None
    extent, orders = totals["output_sqnr_interval"], in_all_orders(module, calls, powers)
    return Row(name, len(calls), totals["calls_measured"], totals["output_sqnr"], true, extent, orders)


def in_all_orders(module: nn.Module, calls: list[Call], powers: list[Power]) -> list[float]:
    """The SQNR over the measured calls for each order of the prompts, given the power of each call."""
    found = []
    for order in itertools.permutations(sorted({call.unit for call in calls})):
        positions = sorted(range(len(calls)), key=lambda at, order=order: (order[calls[at].unit], at))
        current = CurrentCall(module)
        for _ in current.tracked(calls[at]._replace(unit=order[calls[at].unit]) for at in positions):
            pass
        sqnr = total(powers[positions[at]] for at in measured_calls(current, MEASURED)).sqnr
        found.append(math.inf if sqnr is None else sqnr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accuracy", default="fast", choices=list(RECIPES))
    options = parser.parse_args()
    logging.getLogger("octavo.calibrate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found: list[Row] = []
    for name in options.names or list(ZOO):
        with quiet():
            try:
                made = list(rows(name, options.prompts, options.steps, options.accuracy))
            except Exception as error:
                print(f"{name}: left out ({type(error).__name__}: {str(error)[:100]})", flush=True)
                continue
        for row in made:
            print(f"{row.name}: {row.printed:.2f} dB on {row.measured}, {row.true:.2f} dB on {row.calls}", flush=True)
        found += made
    show(found)


def show(found: list[Row]) -> None:
    """Prints the quantiles of the distance and the worst denoiser."""
    distances = sorted(abs(row.printed - row.true) for row in found)
    worst = max(found, key=lambda row: abs(row.printed - row.true))
    cells = ", ".join(
        f"{share} % {distances[min(len(found) * share // 100, len(found) - 1)]:.2f}" for share in (50, 90, 95, 99)
    )
    inside = sum(row.extent is not None and row.extent[0] <= row.true <= row.extent[1] for row in found)
    print(f"{len(found)} denoisers; distance in dB: {cells}; worst {distances[-1]:.2f} ({worst.name})")
    near = sum(distance <= 1.0 for distance in distances)
    print(f"within 1 dB: {near / len(found):.1%} (bar: 95 %); inside the interval: {inside / len(found):.1%}")
    every = [abs(sqnr - row.true) <= 1.0 for row in found for sqnr in row.orders]
    print(f"within 1 dB in all {len(every)} orders of prompts: {sum(every) / len(every):.1%}")


if __name__ == "__main__":
    main()
