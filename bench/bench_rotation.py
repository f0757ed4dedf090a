"""Compares smoothing, rotation and both on random SD3 transformers: SQNR of the output and of each kind of layer.

    python -m bench.bench_rotation [--cell "r o"] [--seeds 0 1 2] [--calls 16] [--activations dynamic] [--weights gptq]
    python -m bench.bench_rotation --cost                                         the time of rotating an input

All are measured on held-out calls, against the float model. The kinds of layers are their names without the block's
number; their SQNR is of the layers' own outputs, with the float inputs, and the mean over blocks and seeds. With
--cost, the time of rotating 1357 tokens of 1536 channels is divided by that of a linear layer to as many channels.
"""

import argparse
import statistics
import time
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.schemes import ROTATIONS
from octavo.calibrate.layers.transforms import Rotate
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from tests.zoo.random_sd3 import random_calls

from .bench_networks import CELLS, decibels, network, outputs

ROWS = {
    "neither": {},
    "smoothing": {"smoothing": True},
    "rotation": {"rotation": "auto"},
    **{f"rotation {size}": {"rotation": str(size)} for size in ROTATIONS},
    "both": {"smoothing": True, "rotation": "auto"},
}


def cost() -> None:
    """Prints the time of each rotation, divided by that of a linear layer in float32."""
    x, weight = torch.randn(1357, 1536), torch.randn(1536, 1536)
    print("| channels in a group | time of rotating : time of a float32 linear layer |\n|---|---|")
    for size in ROTATIONS:
        rotate, times = Rotate.by(size), ([], [])
        for _ in range(8):
            for values, function in zip(times, (partial(rotate.input, x), partial(F.linear, x, weight)), strict=True):
                start = time.perf_counter()
                function()
                values.append(time.perf_counter() - start)
        print(f"| {size} | {statistics.median(times[0][1:]) / statistics.median(times[1][1:]):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=list(CELLS), default="r o")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--calls", type=int, default=16)
    parser.add_argument("--activations", default="dynamic")
    parser.add_argument("--weights", nargs="*", default=[])
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        return cost()
    calls, held_out_calls = random_calls(options.calls, 5), random_calls(12, 6)
    totals: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    chosen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for seed in options.seeds:
        for name, changes in ROWS.items():
            model = network(options.cell, seed)
            exact = outputs(model, held_out_calls)
            settings = Settings(
                defaults=SD3.keep_float, groups=SD3.groups, activations=options.activations,
                weights=tuple(options.weights), **changes,
            )  # fmt: skip
            result = calibrate(model, lambda: calls, settings)
            with quantized(model, result.layers):
                totals[name].append(decibels(exact, outputs(model, held_out_calls)))
            for row in result.report["layers"]:
                if row["name"] in result.layers and row.get("sqnr") is not None:
                    kind = row["name"].split(".", 2)[-1]
                    kinds[kind][name].append(row["sqnr"])
                    parts = ["s"] * ("multiplier" in row) + [str(row.get("rotation"))] * ("rotation" in row)
                    chosen[kind][name].append("+".join(parts) or "-")
    print(f"| layers | {' | '.join(ROWS)} | chosen with both |\n|---|{'---|' * (len(ROWS) + 1)}")
    print(f"| output | {' | '.join(f'{statistics.median(totals[name]):.1f} dB' for name in ROWS)} | |")
    for kind, by_row in kinds.items():
        words = chosen[kind]["both"]
        counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
        print(f"| {kind} | {' | '.join(f'{statistics.mean(by_row[name]):.1f}' for name in ROWS)} | {counts} |")


if __name__ == "__main__":
    main()
