"""Compares timestep ranges (one for each bin of noise levels) with static ranges, on held-out calls.

    python -m bench.bench_timesteps [--rows "r o" demo ...] [--calls 16 32 64]
    python -m bench.bench_timesteps --steps [--prompts 16] [--held 8]

The first table compares both for smoothed inputs, on the random SD3 transformers of bench_networks (r, a; o: outliers)
and on the bundled pipeline in 8 steps, there with and without smoothing. The bar is that no row loses more than 0.2 dB.
The second table, with --steps, is about ranges from calls of 28 steps that are used with 20 or 50 steps: it has their
error relative to ranges from calls of 20 or 50 steps.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.settings import Settings
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts
from tests.zoo.random_sd3 import random_calls

from .accuracy import recorded, sqnr
from .bench_networks import CELLS, network

DEMO = {"demo": True, "demo, no smoothing": False}  # rows of the bundled pipeline, and whether inputs are smoothed
DEMO_STEPS = 8


class Case(NamedTuple):
    """A model, its calibration calls, its held-out calls, and whether its inputs are smoothed."""

    model: nn.Module
    calls: list[Any]
    held_out: list[Any]
    smoothing: bool


def cases(row: str, counts: list[int], seed: int) -> Iterator[Case]:
    """Yields the cases of a row, one for each number of calibration calls."""
    if row in CELLS:
        model, held_out_calls = network(row, seed), random_calls(12, 6)
        for count in counts:
            yield Case(model, random_calls(count, 5), held_out_calls, True)
        return
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    held_out_calls = recorded(pipe, list(read_prompts("demo-heldout").texts[-4:]), DEMO_STEPS)
    calls = recorded(pipe, list(read_prompts("demo").texts[: max(counts) // DEMO_STEPS]), DEMO_STEPS)
    for count in counts:
        yield Case(model, calls[:count], held_out_calls, DEMO[row])


def against_static(rows: list[str], counts: list[int], seed: int) -> None:
    """Prints a line for each row and number of calibration calls, then the smallest and the largest difference."""
    print("| network | calls | static | timestep | difference |\n|---|---|---|---|---|")
    differences = []
    for row in rows:
        for case in cases(row, counts, seed):
            sqnrs = {}
            for word in ("static", "timestep"):
                settings = Settings(
                    defaults=SD3.keep_float, groups=SD3.groups, smoothing=case.smoothing, activations=word, sqnr_calls=0
                )
                layers = calibrate(case.model, lambda case=case: case.calls, settings).layers
                sqnrs[word] = sqnr(case.model, layers, case.held_out)
            differences.append(sqnrs["timestep"] - sqnrs["static"])
            columns = f"{len(case.calls)} | {sqnrs['static']:.2f} dB | {sqnrs['timestep']:.2f} dB"
            print(f"| {row} | {columns} | {differences[-1]:+.2f} |", flush=True)
    print(f"\nsmallest difference: {min(differences):+.2f} dB (bar: -0.2), largest: {max(differences):+.2f} dB")


def at_other_steps(prompts: int, held_out_count: int) -> None:
    """Prints the error of ranges from calls of 28 steps when the model runs with 20 and with 50 steps."""
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    texts = list(read_prompts("demo").texts[:prompts])
    held_out = list(read_prompts("demo-heldout").texts[-held_out_count:])
    by_steps = {steps: recorded(pipe, texts, steps) for steps in (28, 20, 50)}
    judged = {steps: recorded(pipe, held_out, steps) for steps in (20, 50)}
    print("| ranges | smoothing | run with | ranges from 28 steps | from as many steps | relative error |")
    print("|---|---|---|---|---|---|")
    for smoothing, activations in itertools.product((False, True), ("static", "timestep")):
        settings = Settings(
            defaults=SD3.keep_float, groups=SD3.groups, smoothing=smoothing, activations=activations, sqnr_calls=0
        )
        layers_by_steps = {
            steps: calibrate(model, lambda calls=calls: calls, settings).layers for steps, calls in by_steps.items()
        }
        for steps, calls in judged.items():
            here, there = (sqnr(model, layers_by_steps[count], calls) for count in (28, steps))
            columns = f"{activations} | {smoothing} | {steps} steps | {here:.2f} dB | {there:.2f} dB"
            print(f"| {columns} | {10 ** ((there - here) / 10):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[*CELLS, *DEMO])
    parser.add_argument("--calls", nargs="*", type=int, default=[16, 32, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", action="store_true", help="print the second table")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--held", type=int, default=8)
    options = parser.parse_args()
    if options.steps:
        at_other_steps(options.prompts, options.held)
    else:
        against_static(options.rows, options.calls, options.seed)


if __name__ == "__main__":
    main()
