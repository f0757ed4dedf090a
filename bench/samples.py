"""Compares ways to choose a few calibration calls out of 16 prompts of 28 steps, on the bundled pipeline.

    python -m bench.samples [--counts 4 8 16 32 64 128] [--recipe plain] [--seeds 5] [--held 8]

The numbers are the SQNR in dB of the transformer's output, over every fourth call of held-out prompts.
"""

import argparse
import random
from collections.abc import Callable

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.calibrate.replay.farthest_calls import farthest
from octavo.calibrate.settings import Settings
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import ROWS, recorded, sqnr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", nargs="*", type=int, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--recipe", choices=list(ROWS), default="plain")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held", type=int, default=8)
    options = parser.parse_args()
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    calls = recorded(pipe, list(read_prompts("demo").texts[:16]))
    held_out_calls = recorded(pipe, list(read_prompts("demo-heldout").texts[-options.held :]))[1::4]
    settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, sqnr_calls=0, **ROWS[options.recipe])

    def sqnr_with(positions: list[int]) -> float:
        some = [calls[position] for position in positions]
        return sqnr(model, calibrate(model, lambda: some, settings).layers, held_out_calls)

    def by_seed(seed: int) -> Callable[[int], list[int]]:
        return lambda count: sorted(random.Random(seed * 1000 + count).sample(range(len(calls)), count))

    ways: dict[str, Callable[[int], list[int]]] = {
        "farthest": lambda count: farthest(calls, count),
        "spread": lambda count: evenly_spaced(len(calls), count),
        "first": lambda count: list(range(count)),
        **{f"random {seed}": by_seed(seed) for seed in range(options.seeds)},
    }
    print(f"{options.recipe}, all {len(calls)}: {sqnr_with(list(range(len(calls)))):.2f} dB", flush=True)
    print("| calls | " + " | ".join(str(count) for count in options.counts) + " |")
    print("|---|" + "---|" * len(options.counts))
    for name, way in ways.items():
        print(
            f"| {name} | " + " | ".join(f"{sqnr_with(way(count)):.2f}" for count in options.counts) + " |", flush=True
        )


if __name__ == "__main__":
    main()
