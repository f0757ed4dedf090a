"""Measures a denoiser that others trained, the terrain UNet of a package, in integers.

    OMP_NUM_THREADS=1 python -m bench.terrain --cache FOLDER [--terrains 4] [--held 3] [--steps 4]
                                              [--sections agreement recipes kinds float]
                                              [--recipes plain "fast, dynamic" ...]

pip downloads the package adaptive-terrain-diffusion into FOLDER. Its ONNX graph, a consistency model, becomes a module
of torch (tests/zoo/guided_onnx.py). A terrain is sampled as consistency models are: estimated from noise, then given
noise of a lower level and estimated again, --steps times. A Listener records the calls. The calls of --terrains
terrains calibrate, those of --held others are measured.

The sections are
- agreement: the largest difference between the module and onnxruntime, over the held-out calls;
- recipes: the SQNR of the output by recipe and by how inputs become codes; the SQNR of the calls at each noise level;
  the PSNR of terrains of one step, as the package makes them (values from -1 to 1);
- kinds: the SQNR with only the layers of one kind in integers, and the SQNR of these layers' outputs;
- float: the SQNR, and the size of the layers, with more and more kinds kept float.
"""

import argparse
import logging
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from torch import Tensor, nn

from octavo import Listener
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.sqnr import Power, outputs, powers_of, total
from octavo.calibrate.result import Result
from octavo.calibrate.settings import RECIPES, Settings
from tests.zoo.guided_onnx import read_denoiser
from tests.zoo.guided_unet import SIGMA_MIN

from .accuracy import Call
from .consumer_environment import installed

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
GRAPH = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
SIZE, SIGMA_MAX, RHO = 128, 80.0, 7.0  # places along a side; highest noise level; bend of the levels (Karras, 2022)
HELD_OUT = 1000  # seed of the first held-out terrain
INPUTS = ("static", "dynamic", "float")  # how inputs become codes; float: weight-only

# settings by row of the section recipes
ROWS: dict[str, dict[str, Any]] = {
    **{name: RECIPES[name] for name in ("plain", "fast", "balanced", "best")},
    **{f"{name}, dynamic": RECIPES[name] | {"activations": "dynamic"} for name in ("plain", "fast")},
    **{f"{name}, weight-only": RECIPES[name] | {"activations": "float"} for name in ("plain", "balanced")},
}

# kinds of layers: pattern of names; a layer has the first kind whose pattern is found
KINDS = {
    "first convolution": r"input_blocks\.0\.0$",
    "last convolution": r"\.out\.2$",
    "time and label embedding": r"(time_embed|label_emb)\.",
    "modulation": r"emb_layers",
    "attention qkv": r"qkv$",
    "attention proj_out": r"proj_out$",
    "skip_connection": r"skip_connection$",
    "down and up": r"input_blocks\.(5|10|15|20)\.0\.|output_blocks\.(4\.2|9\.2|14\.2|19\.1)\.",
    "in_layers": r"in_layers",
    "out_layers": r"out_layers",
}
# kinds that stay float, by row of the section float
FLOAT: dict[str, tuple[str, ...]] = {
    "none": (),
    "skip_connection": ("skip_connection",),
    "and modulation, embedding": ("skip_connection", "modulation", "time and label embedding"),
    "and first, last convolution": (
        "skip_connection", "modulation", "time and label embedding", "first convolution", "last convolution"
    ),
    "and out_layers": (
        "skip_connection", "modulation", "time and label embedding", "first convolution", "last convolution",
        "out_layers",
    ),
}  # fmt: skip
RULE = "general rule"  # the row of the layers that Octavo keeps float by default


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def levels(steps: int) -> list[float]:
    """Returns the noise levels of a sampling in `steps` steps, the highest first."""
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(ends[0] + step / steps * (ends[1] - ends[0])) ** RHO for step in range(steps)]


@torch.no_grad()
def sample(model: nn.Module, seed: int, steps: int) -> list[Tensor]:
    """Samples a terrain; returns the estimate of each step, (1, 1, SIZE, SIZE) with values from -1 to 1. `seed` decides
    the terrain's difficulty and all noise."""
    generator = torch.Generator().manual_seed(seed)
    difficulty, terrains = torch.rand(1, generator=generator), [torch.zeros(1, 1, SIZE, SIZE)]
    for sigma in levels(steps):
        noise = torch.randn(terrains[-1].shape, generator=generator)
        noisy = terrains[-1] + math.sqrt(sigma**2 - SIGMA_MIN**2) * noise
        terrains.append(model(noisy=noisy, sigma=torch.tensor([sigma]), difficulty=difficulty))
    return terrains[1:]


class Data(NamedTuple):
    """The model, its calibration calls, the held-out calls with their float outputs, and the steps of a sampling."""

    model: nn.Module
    calls: list[Call]
    held_out: list[Call]
    exact: list[Tensor]
    steps: int


def recorded(model: nn.Module, seeds: Iterable[int], steps: int) -> tuple[list[Call], list[Tensor]]:
    """Samples a terrain for each seed; returns the recorded calls and their outputs."""
    calls, terrains = [], list[Tensor]()
    for unit, seed in enumerate(seeds):
        listener = Listener(model)
        terrains += sample(listener, seed, steps)
        calls += [Call((), kwargs, unit, step) for step, kwargs in enumerate(listener.inputs)]
    return calls, terrains


def outputs_of(model: nn.Module, calls: list[Call]) -> list[Tensor]:
    return [output[0] for output in outputs(model, calls)]


def decibels(power: Power) -> str:
    return "exact" if power.sqnr is None else f"{power.sqnr:.1f}"


def powers(data: Data, layers: Mapping[str, QuantizedLayer]) -> list[Power]:
    """Returns signal and noise of the output of each held-out call with these integer layers."""
    with quantized(data.model, layers):
        return powers_of([[y] for y in data.exact], outputs(data.model, data.held_out))


def sqnr(data: Data, layers: Mapping[str, QuantizedLayer]) -> str:
    return decibels(total(powers(data, layers)))


def psnr(found: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the PSNR in dB of all terrains in `found`, whose values are from -1 to 1."""
    errors = [float((one - other).square().mean()) for one, other in zip(found, exact, strict=True)]
    return 10 * math.log10(4 / statistics.mean(errors))


def print_agreement(data: Data, graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options)
    off = 0.0
    for call, exact in zip(data.held_out, data.exact, strict=True):
        found = session.run(None, {name: value.numpy() for name, value in call.kwargs.items()})[0]
        off = max(off, float((torch.from_numpy(found) - exact).abs().max()))
    print(f"module and onnxruntime: at most {off:.1e} apart in {len(data.held_out)} calls", flush=True)


def sizes(result: Result, layers: Iterable[str]) -> str:
    """Returns the MiB of all layers if `layers` are integer and the others float."""
    integer = set(layers)
    rows = result.report["layers"]
    return f"{sum(row['bytes_after' if row['name'] in integer else 'bytes_before'] for row in rows) / 2**20:.1f}"


def print_recipes(data: Data, rows: Mapping[str, dict[str, Any]]) -> None:
    """Prints a row for each of `rows`, settings by name, with the layers float that stay so by default."""
    print("\n| recipe | layers in int8, float | MiB | SQNR | at each noise level | PSNR | calibration, CPU time |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, settings in rows.items():
        began = time.process_time()
        result = calibrate(data.model, lambda: data.calls, Settings(**settings, sqnr_calls=1))
        seconds = time.process_time() - began
        with quantized(data.model, result.layers):
            terrains = outputs_of(data.model, data.held_out)
        found = powers_of([[y] for y in data.exact], [[y] for y in terrains])
        steps = [decibels(total(found[step :: data.steps])) for step in range(data.steps)]
        quality = psnr(terrains[:: data.steps], data.exact[:: data.steps])
        totals = result.report["totals"]
        cells = [f"{totals['quantized']}, {totals['kept_float']}", sizes(result, result.layers)]
        cells += [f"{decibels(total(found))} dB", ", ".join(steps), f"{quality:.1f} dB"]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} s |", flush=True)


def all_integer(data: Data) -> dict[str, Result]:
    """Calibrates all layers by the recipe plain, with inputs of each kind of INPUTS."""
    return {word: calibrate(data.model, lambda: data.calls, Settings(activations=word, defaults={})) for word in INPUTS}


def print_kinds(data: Data, results: Mapping[str, Result]) -> None:
    """Prints a row for each kind of layers: how many, their size, and the SQNR if only they are integer."""
    print("\n| only these layers in int8 | layers | MiB float, int8 | layers' SQNR, mean, worst |", end="")
    print(" static | dynamic | weight-only |\n|---|---|---|---|---|---|---|")
    rows = results["static"].report["layers"]
    for kind in KINDS:
        members = [row for row in rows if kind_of(row["name"]) == kind]
        names = {row["name"] for row in members}
        mebibytes = [sum(row[key] for row in members) / 2**20 for key in ("bytes_before", "bytes_after")]
        values = [row["sqnr"] for row in members if row.get("sqnr") is not None]
        cells = [str(len(members)), ", ".join(f"{value:.2f}" for value in mebibytes)]
        cells.append(f"{statistics.mean(values):.1f}, {min(values):.1f} dB")
        for result in results.values():
            cells.append(sqnr(data, {name: layer for name, layer in result.layers.items() if name in names}) + " dB")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    widest = max(rows, key=lambda row: row["range"][1] - row["range"][0])
    print(f"widest input: {widest['name']}, {widest['range'][0]:.2g} to {widest['range'][1]:.2g}")


def print_float(data: Data, results: Mapping[str, Result]) -> None:
    """Prints a row for each set of layers that stay float."""
    print("\n| float | layers in int8 | MiB | static | dynamic | weight-only |\n|---|---|---|---|---|---|")
    plan = calibrate(data.model, lambda: data.calls[:1], Settings()).plan
    sets = {name: [layer for layer in results["static"].layers if kind_of(layer) not in kinds]
            for name, kinds in FLOAT.items()} | {RULE: list(plan.quantized)}  # fmt: skip
    for name, integer in sets.items():
        cells = [str(len(integer)), sizes(results["static"], integer)]
        for result in results.values():
            cells.append(sqnr(data, {layer: result.layers[layer] for layer in integer}) + " dB")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("agreement", "recipes", "kinds", "float")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the package")
    parser.add_argument("--terrains", type=int, default=4, help="terrains to calibrate with")
    parser.add_argument("--held", type=int, default=3, help="terrains to measure")
    parser.add_argument("--steps", type=int, default=4, help="noise levels of a sampling")
    parser.add_argument("--sections", nargs="*", default=list(sections), choices=sections)
    parser.add_argument("--recipes", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    logging.getLogger("octavo.calibrate").setLevel(logging.ERROR)
    began = time.perf_counter()
    graph = installed("terrain", [PACKAGE], options.cache) / GRAPH
    model = read_denoiser(graph)
    calls, _ = recorded(model, range(options.terrains), options.steps)
    data = Data(model, calls, *recorded(model, range(HELD_OUT, HELD_OUT + options.held), options.steps), options.steps)
    parts = ", ".join(f"{level:.3g}" for level in levels(options.steps))
    print(f"{len(calls)} calibration calls, {len(data.held_out)} held out; noise levels {parts}", flush=True)
    if "agreement" in options.sections:
        print_agreement(data, graph)
    if "recipes" in options.sections:
        print_recipes(data, {name: ROWS[name] for name in options.recipes})
    if {"kinds", "float"} & set(options.sections):
        results = all_integer(data)
        for section, show in (("kinds", print_kinds), ("float", print_float)):
            if section in options.sections:
                show(data, results)
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
