"""Measures the accuracy of each calibration method on the bundled pipeline, with and without added outliers.

    python -m bench.accuracy [--rows plain smoothing ...] [--outliers] [--pictures 200] [--prompts 16] [--held 4]

The transformer's SQNR is measured over all calls of held-out prompts, with float inputs for both models; the layers'
mean and worst SQNR over eight calls that were replayed. `median MSE` is the median over layers of the squared error,
relative to the first row with the same kind of inputs, smoothed or not. `seconds` is the time of calibrate, which
includes a plain replay of the calls; `of plain` is its ratio to plain forwards just before. `peak memory` is the peak
of the process, which runs one row after the other.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.replay.calls import evaluating, run
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.resources import peak_memory
from octavo.calibrate.settings import RECIPES, Settings
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines.demo.judge import score
from octavo.pipelines.demo.scene import parse
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.run import prompt_seed
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts
from tests.zoo.drawing import draw
from tests.zoo.random_sd3 import put_outliers

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sigma": {"observer": "sigma"},
    "percentile": {"observer": "percentile"},
    "mse": {"observer": "mse"},
    "smoothing": {"smoothing": True},
    "smoothing, mse": {"smoothing": True, "observer": "mse"},
    "bias correction": {"bias_correction": True},
    "easy-quant": {"weights": ("easy-quant",)},
    "admm": {"weights": ("admm",)},
    "adaround": {"weights": ("adaround",)},
    "gptq": {"weights": ("gptq",)},
    "smoothing, gptq": {"smoothing": True, "weights": ("gptq",)},
    "smoothing, admm": {"smoothing": True, "weights": ("admm",)},
    "weights alone": {"activations": "float"},
    "weights alone, easy-quant": {"activations": "float", "weights": ("easy-quant",)},
    "weights alone, admm": {"activations": "float", "weights": ("admm",)},
    "weights alone, gptq": {"activations": "float", "weights": ("gptq",)},
    "dynamic": {"activations": "dynamic"},
    "timestep": {"activations": "timestep"},
    **{f"--accuracy {name}": recipe for name, recipe in RECIPES.items() if name != "plain"},
}


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int
    step: int | None


def recorded(pipe: Any, prompts: list[str], steps: int = 28) -> list[Any]:
    """The calls of the transformer for the prompts, each with the index of its prompt as its unit."""
    calls: list[Any] = []
    for unit, prompt in enumerate(prompts):
        memory = Memory()
        with Recorder(pipe.transformer, memory):
            generator = torch.Generator().manual_seed(prompt_seed(prompt, 0))
            pipe(prompt, generator=generator, num_inference_steps=steps, output_type="latent")
        calls += [Call(call.args, call.kwargs, unit, call.step) for call in memory.calls]
    return calls


def sqnr(model: nn.Module, layers: Any, calls: list[Any]) -> float:
    """The SQNR of the model's output over the calls, in dB."""
    power = Power()
    exact = outputs(model, calls)
    with quantized(model, layers):
        for one, other in zip(exact, outputs(model, calls), strict=True):
            power.add(one[0], other[0])
    return power.sqnr or float("inf")


HEAD = """\
| method | transformer SQNR | layers, mean | worst | median MSE | seconds | of plain | peak memory | judged |
|---|---|---|---|---|---|---|---|---|"""


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--held", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False)
    if options.outliers:
        put_outliers(model, seed=0)
    held_out = list(read_prompts("demo-heldout").texts)
    calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]))
    held = recorded(pipe, held_out[-options.held :])
    scenes = [parse(prompt) for prompt in held_out[: options.pictures]]

    def forwards() -> float:
        began = time.perf_counter()
        with evaluating(model):
            for at, call in enumerate(calls):
                run(model, call, at)
        return time.perf_counter() - began

    print(f"{len(calls)} calls, {len(held)} held out", HEAD, sep="\n")
    starts: dict[tuple[bool, str], dict[str, float]] = {}  # layer errors by whether inputs are smoothed, and their kind
    if options.pictures:
        right = score(draw(pipe, held_out[: options.pictures]), scenes)["all"]
        print(f"| float | | | | | | | | {right:.1%} |", flush=True)
    for name in options.rows:
        plain = forwards()
        began = time.perf_counter()
        result = calibrate(model, lambda: calls, Settings(defaults=SD3.keep_float, groups=SD3.groups, **ROWS[name]))
        seconds = time.perf_counter() - began
        found = [row["sqnr"] for row in result.report["layers"] if row["scheme"] and row.get("sqnr") is not None]
        cells = [f"{sqnr(model, result.layers, held):.2f} dB", f"{sum(found) / len(found):.1f}", f"{min(found):.1f}"]
        errors = {row["name"]: row["mse"] for row in result.report["layers"] if row["scheme"] and row.get("mse")}
        kind = ROWS[name].get("smoothing", False), ROWS[name].get("activations", "static")
        start = starts.setdefault(kind, errors)
        ratio = statistics.median(errors[layer] / start[layer] for layer in errors if layer in start)
        cells += [f"{ratio:.2f} x", f"{seconds:.1f}", f"{seconds / plain:.2f} x", f"{peak_memory() / 2**20:.0f} MiB"]
        with quantized(model, result.layers):
            right = score(draw(pipe, held_out[: options.pictures]), scenes)["all"] if scenes else 0.0
        print(f"| {name} | {' | '.join(cells)} | {f'{right:.1%}' if scenes else ''} |", flush=True)


if __name__ == "__main__":
    main()
