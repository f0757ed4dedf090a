"""Measures how far the reported output SQNR, of a few calls, is from the SQNR over all calls; uses tests/zoo.

    python -m bench.bench_sqnr [NAME ...] [--prompts 4] [--steps 8] [--accuracy fast]

Each tiny pipeline of tests/zoo runs each prompt with --steps steps. Each of its denoisers is calibrated as by `octavo
calibrate`, and the float and the integer model run on all calls. The prompts are the embeddings of the test pipeline,
mixed with different noise. Prints a line for each denoiser, then the quantiles of the difference, and how often the
reported interval contains the SQNR over all calls. The order of the prompts determines which prompts are held out and
which calls are measured; the last line is about all orders.
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
    """The numbers of one denoiser.

    `calls` counts all calls, `measured` those of the reported SQNR. `printed` is the reported SQNR in dB, `extent` its
    interval, `true` the SQNR over all calls. `orders` has the SQNR that each order of the prompts would report.
    """

    name: str
    calls: int
    measured: int
    printed: float
    true: float
    extent: tuple[float, float] | None
    orders: list[float]


def of_prompt(arguments: dict[str, Any], unit: int, steps: int) -> dict[str, Any]:
    """Makes the arguments of prompt number `unit`: mixes embeddings with noise, which has a quarter of the energy."""
    generator = torch.Generator().manual_seed(unit)

    def varied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            return 0.75**0.5 * value + 0.5 * value.std() * noise
        return value

    varied_arguments = {name: varied(value) if "embeds" in name else value for name, value in arguments.items()}
    return varied_arguments | ({"num_inference_steps": steps} if "num_inference_steps" in varied_arguments else {})


def recorded(pipe: Any, arguments: dict[str, Any], prompts: int, steps: int) -> dict[str, list[Call]]:
    """Runs the pipeline; returns the calls of each of its denoisers, each call with the number of its prompt."""
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
    """Yields a row for each denoiser of a pipeline."""
    pipe, arguments = make(name)
    family = family_of(type(pipe).__name__)
    options: dict[str, Any] = {"defaults": family.keep_float, "more_float": family.more_float, "groups": family.groups}
    for module in denoisers(pipe).values():
        module.requires_grad_(False)
    for component, calls in recorded(pipe, arguments, prompts, steps).items():
        module = denoisers(pipe)[component]
        settings = Settings(**options, **RECIPES[recipe])
        if calls and (row := measured(f"{name}.{component}", module, calls, settings)):
            yield row


def measured(name: str, module: nn.Module, calls: list[Call], settings: Settings) -> Row | None:
    """Calibrates one denoiser and makes its row; None if its integer layers make no error."""
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
    """Computes the SQNR that would be reported for each order of the prompts, given the power of each call."""
    sqnrs = []
    for order in itertools.permutations(sorted({call.unit for call in calls})):
        positions = sorted(range(len(calls)), key=lambda position, order=order: (order[calls[position].unit], position))
        current = CurrentCall(module)
        for _ in current.tracked(calls[position]._replace(unit=order[calls[position].unit]) for position in positions):
            pass
        sqnr = total(powers[positions[index]] for index in measured_calls(current, MEASURED)).sqnr
        sqnrs.append(math.inf if sqnr is None else sqnr)
    return sqnrs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accuracy", default="fast", choices=list(RECIPES))
    options = parser.parse_args()
    logging.getLogger("octavo.calibrate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    all_rows: list[Row] = []
    for name in options.names or list(ZOO):
        with quiet():
            try:
                rows_of_pipeline = list(rows(name, options.prompts, options.steps, options.accuracy))
            except Exception as error:
                print(f"{name}: skipped ({type(error).__name__}: {str(error)[:100]})", flush=True)
                continue
        for row in rows_of_pipeline:
            print(f"{row.name}: {row.printed:.2f} dB on {row.measured}, {row.true:.2f} dB on {row.calls}", flush=True)
        all_rows += rows_of_pipeline
    show(all_rows)


def show(all_rows: list[Row]) -> None:
    """Prints the quantiles of the difference, the worst denoiser, and how often the interval was right."""
    distances = sorted(abs(row.printed - row.true) for row in all_rows)
    worst = max(all_rows, key=lambda row: abs(row.printed - row.true))
    cells = ", ".join(
        f"{share} % {distances[min(len(all_rows) * share // 100, len(all_rows) - 1)]:.2f}" for share in (50, 90, 95, 99)
    )
    inside = sum(row.extent is not None and row.extent[0] <= row.true <= row.extent[1] for row in all_rows)
    print(f"{len(all_rows)} denoisers; difference in dB: {cells}; worst {distances[-1]:.2f} ({worst.name})")
    near = sum(distance <= 1.0 for distance in distances)
    print(f"within 1 dB: {near / len(all_rows):.1%} (bar: 95 %); inside the interval: {inside / len(all_rows):.1%}")
    every = [abs(sqnr - row.true) <= 1.0 for row in all_rows for sqnr in row.orders]
    print(f"within 1 dB in all {len(every)} orders of prompts: {sum(every) / len(every):.1%}")


if __name__ == "__main__":
    main()
