"""Ranges by noise level from 28 steps, at other numbers of steps: the error over that of ranges found at that number.

python -m bench.bench_timesteps [--prompts 8] [--held 4]
"""

import argparse

from bench.accuracy import recorded, sqnr
from calibrate.run import calibrate
from calibrate.settings import Settings
from pipelines.load import load_pipeline, model_directory
from pipelines.sd3 import SD3
from prompts import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--held", type=int, default=4)
    options = parser.parse_args()
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    prompts = list(read_prompts("demo").texts[: options.prompts])
    held_out = list(read_prompts("demo-heldout").texts[-options.held :])
    found = {}
    for activations in ("static", "timestep"):
        settings = Settings(
            defaults=SD3.keep_float, groups=SD3.groups, smoothing=True, activations=activations, sqnr_calls=0
        )
        for steps in (28, 20, 50):
            calls = recorded(pipe, prompts, steps)
            found[activations, steps] = calibrate(model, lambda calls=calls: calls, settings).layers
    print(
        "| activations | run at | ranges of 28 steps | ranges of that number | error, of that |\n|---|---|---|---|---|"
    )
    for activations in ("static", "timestep"):
        for steps in (20, 50):
            held = recorded(pipe, held_out, steps)
            here, there = (sqnr(model, found[activations, count], held) for count in (28, steps))
            ratio = 10 ** ((there - here) / 10)
            print(f"| {activations} | {steps} steps | {here:.2f} dB | {there:.2f} dB | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
