"""Measures how time, memory and disk space grow with prompts, steps, tokens and layers.

python bench/growth.py --sheet docs/growth.png

Each point is measured in a process of its own; time is processor time. The exponent is the slope of the last doubling
in a log-log plot: 1 means linear growth.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import SD3Transformer2DModel

from bench.bench_calibrate import Call
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import export
from octavo.calibrate.resources import peak_memory
from octavo.calibrate.settings import RECIPES, Settings
from octavo.cli import main as octavo

# the amounts at which each quantity is measured, each twice the one before
POINTS = {
    "prompts": (2, 4, 8, 16),
    "steps": (8, 16, 32, 64),
    "tokens": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
}
MEASURES = {"seconds": "processor seconds", "peak": "peak memory, MiB", "disk": "disk, MiB"}


def bundled(folder: Path, what: str, amount: int) -> dict[str, tuple[float, float]]:
    """Captures and calibrates the bundled pipeline; returns the seconds and the MiB on disk of each command."""
    prompts, steps = (amount, 4) if what == "prompts" else (1, amount)
    run = "--limit", str(prompts), "--steps", str(steps), "--device", "cpu"
    parts = {
        "capture": ["capture", "demo", str(folder / "captured"), *run],
        "calibrate": ["calibrate", str(folder / "captured"), str(folder / "w8a8")],
    }
    measurements = {}
    for part, (name, arguments) in zip(("captured", "w8a8"), parts.items(), strict=True):
        began = time.process_time()
        octavo([*arguments, "--json"], standalone_mode=False)
        measurements[name] = (time.process_time() - began, _disk(folder / part))
    return measurements


def synthetic(folder: Path, what: str, amount: int) -> dict[str, tuple[float, float]]:
    """Calibrates a random SD3 transformer, 128 wide, on 8 calls; returns the seconds and the MiB on disk."""
    layers, tokens = (amount, 256) if what == "layers" else (4, amount)
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=64, patch_size=1, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=128,
    ).eval()  # fmt: skip
    calls = [
        Call((), {
            "hidden_states": torch.randn(1, 4, tokens // 8, 8), "encoder_hidden_states": torch.randn(1, 16, 64),
            "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([100.0 * index]), "return_dict": False,
        }) for index in range(8)
    ]  # fmt: skip
    began = time.process_time()
    result = calibrate(model, lambda: calls, Settings(release=True, **RECIPES["fast"]))
    export(result, model, folder / "w8a8")
    return {"calibrate": (time.process_time() - began, _disk(folder / "w8a8"))}


def _disk(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def child(what: str, amount: int) -> None:
    """Prints one point as JSON: for each command its seconds, the MiB of peak memory and the MiB on disk."""
    with tempfile.TemporaryDirectory() as name:
        work = bundled if what in ("prompts", "steps") else synthetic
        measurements = work(Path(name), what, amount)
    peak = peak_memory() / 2**20
    print(json.dumps({part: {"seconds": s, "peak": peak, "disk": disk} for part, (s, disk) in measurements.items()}))


def exponent(points: list[tuple[int, float]]) -> float:
    """Computes the slope between the last two points in a log-log plot."""
    (x, y), (x2, y2) = points[-2:]
    return math.log(y2 / y) / math.log(x2 / x)


def curves() -> dict[str, dict[str, dict[str, list[tuple[int, float]]]]]:
    """Measures all curves, and prints each as soon as it is complete.

    Returns lists of (amount, value), by the quantity that grows, then by measure, then by command.
    """
    points_of: dict[str, dict[str, dict[str, list[tuple[int, float]]]]] = {}
    for what, amounts in POINTS.items():
        points_of[what] = {measure: {} for measure in MEASURES}
        for amount in amounts:
            command = [sys.executable, __file__, "--child", what, str(amount)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            for part, values in json.loads(output).items():
                for measure, value in values.items():
                    points_of[what][measure].setdefault(part, []).append((amount, value))
        for measure, parts in points_of[what].items():
            for part, points in parts.items():
                values = "  ".join(f"{amount}: {value:.2f}" for amount, value in points)
                print(f"{what:<8} {part:<10} {measure:<8} {values}  exponent {exponent(points):.2f}", flush=True)
    return points_of


def draw(points_of: dict[str, dict[str, dict[str, list[tuple[int, float]]]]], path: Path) -> None:
    """Draws the curves: a row for each measure, a column for each quantity that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(POINTS), squeeze=False)
    for column, (what, measures) in enumerate(points_of.items()):
        for row, (measure, parts) in enumerate(measures.items()):
            axes = grid[row][column]
            for part, points in parts.items():
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{part}, exponent {exponent(points):.2f}")
            axes.set(xlabel=what, ylabel=MEASURES[measure], xlim=(0, None), ylim=(0, None))
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]))
    points_of = curves()
    if options.sheet:
        draw(points_of, options.sheet)


if __name__ == "__main__":
    main()
