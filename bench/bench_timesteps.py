"""Measures ranges found in 28 steps at other numbers of steps: the error relative to ranges found at that number.

python -m bench.bench_timesteps [--prompts 16] [--held 8]
"""

import argparse
import itertools

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.settings import Settings
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import recorded, sqnr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--held", type=int, default=8)
    options = parser.parse_args()
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    prompts = list(read_prompts("demo").texts[: options.prompts])
    held_out = list(read_prompts("demo-heldout").texts[-options.held :])
    by_steps = {steps: recorded(pipe, prompts, steps) for steps in (28, 20, 50)}
    held = {steps: recorded(pipe, held_out, steps) for steps in (20, 50)}
    print("| ranges | smoothing | run at | of 28 steps | of that number | error, of that |\n|---|---|---|---|---|---|")
    for smoothing, activations in itertools.product((False, True), ("static", "timestep")):
        settings = Settings(
            defaults=SD3.keep_float, groups=SD3.groups, smoothing=smoothing, activations=activations, sqnr_calls=0
        )
        found = {
            steps: calibrate(model, lambda calls=calls: calls, settings).layers for steps, calls in by_steps.items()
        }
        for steps, calls in held.items():
            here, there = (sqnr(model, found[count], calls) for count in (28, steps))
            columns = f"{activations} | {smoothing} | {steps} steps | {here:.2f} dB | {there:.2f} dB"
            print(f"| {columns} | {10 ** ((there - here) / 10):.3f} |", flush=True)


if __name__ == "__main__":
    main()
