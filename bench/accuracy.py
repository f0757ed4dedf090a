"""Measures the accuracy of each calibration method on the bundled pipeline, with or without added outliers.

    python -m bench.accuracy [--rows plain smoothing ...] [--outliers] [--pictures 200] [--prompts 16] [--held 4]

`transformer SQNR` is measured over all calls of held-out prompts, with the same inputs for the float and the integer
model. `layers, mean` and `worst` are the SQNR of layers over eight calibration calls. `median MSE` is the median over
layers of the squared error, relative to the first row with the same kind of inputs and the same choice of smoothing.
`seconds` is the time of calibrate, which includes a replay of all calls; `of plain` is the ratio of that time to
running the calls alone, measured just before. `peak memory` is the peak of the process so far, in which the rows run
one after the other. `bytes` is the size of all linear layers. `judged` is the share of pictures that show what the
prompt says; in brackets are the numbers of prompts that only the float model draws right (-) and that only this model
draws right (+). Up to 200 pictures are of the prompt set demo-heldout, more of the other prompts that were kept out of
training, up to 600.

The row "weights in 4 bits" is there to compare with; Octavo does not write such layers. Its inputs stay float, and each
weight becomes the nearest of 15 values."""

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.calibrate.byte_sizes import size
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.plan import layer_at, make_plan
from octavo.calibrate.replay.calls import evaluating, run
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.resources import peak_memory
from octavo.calibrate.runtime import optimized
from octavo.calibrate.settings import RECIPES, Settings
from octavo.calibrate.smoothing.fold import temporary_values
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines.demo.judge import judge
from octavo.pipelines.demo.scene import parse, split
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.run import prompt_seed
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts
from tests.zoo.drawing import draw_quickly
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
    **{
        f"{name}{', plain' if plain else ''}": ({} if plain else RECIPES["balanced"]) | changes
        for plain in (True, False)
        for name, changes in {
            "fp8 static": {"element": "fp8"},
            "fp8 static, whole weights": {"element": "fp8", "weight_scales": "tensor"},
            "fp8 by row": {"element": "fp8", "activations": "dynamic"},
            "mxfp8": {"element": "mxfp8", "activations": "dynamic"},
            "mxfp8, clamping": {"element": "mxfp8", "activations": "dynamic", "clamping": True},
        }.items()
    },
}


COARSE = "weights in 4 bits"


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int
    step: int | None


def demo_pipeline(*, outliers: bool) -> Any:
    """Loads the bundled pipeline, with outliers in the inputs of its transformer's layers if `outliers`."""
    pipe = load_pipeline(model_directory("demo"))
    model = pipe.transformer.requires_grad_(False).eval()
    if outliers:
        put_outliers(model, seed=0)
    return pipe


def recorded(pipe: Any, prompts: list[str], steps: int = 28) -> list[Any]:
    """Records the transformer's calls for the prompts; the `unit` of a call is the index of its prompt."""
    calls: list[Any] = []
    for unit, prompt in enumerate(prompts):
        memory = Memory()
        with Recorder(pipe.transformer, memory):
            generator = torch.Generator().manual_seed(prompt_seed(prompt, 0))
            pipe(prompt, generator=generator, num_inference_steps=steps, output_type="latent")
        calls += [Call(call.args, call.kwargs, unit, call.step) for call in memory.calls]
    return calls


def sqnr(model: nn.Module, layers: Any, calls: list[Any], changed: AbstractContextManager[Any] | None = None) -> float:
    """Computes the SQNR in dB of the model's output with these integer layers, over all calls. `changed` is entered
    while the quantized model runs, and not for the float outputs."""
    power = Power()
    exact = outputs(model, calls)
    with quantized(model, layers), changed or nullcontext():
        for one, other in zip(exact, outputs(model, calls), strict=True):
            power.add(one[0], other[0])
    return power.sqnr or float("inf")


def coarse(model: nn.Module) -> AbstractContextManager[None]:
    """Rounds the weights of the layers that become integers by default to 4 bits, inside the `with` statement: to the
    nearest of 15 values that lie symmetrically around 0, with one scale for each output channel."""

    def rounded(weight: Tensor) -> Tensor:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 7
        return (weight / scale).round() * scale

    layers = make_plan(model, defaults=SD3.keep_float).quantized
    return temporary_values(
        model, {f"{n}.weight": partial(rounded, layer_at(model, n).weight.detach()) for n in layers}
    )


HEAD = """\
| method | transformer SQNR | layers, mean | worst | median MSE | seconds | of plain | peak memory | bytes | judged |
|---|---|---|---|---|---|---|---|---|---|"""


def arguments() -> argparse.Namespace:
    """Parses the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=[*ROWS, COARSE])
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--held", type=int, default=4)
    return parser.parse_args()


def forwards(model: nn.Module, calls: list[Any]) -> float:
    """Runs the float model over the calls; returns the seconds that this took."""
    began = time.perf_counter()
    with evaluating(model):
        for position, call in enumerate(calls):
            run(model, call, position)
    return time.perf_counter() - began


def judged(pipe: Any, prompts: list[str]) -> list[bool]:
    """Draws a picture for each prompt; returns for each whether it shows what the prompt says."""
    return [
        judge(picture) == parse(prompt) for prompt, picture in zip(prompts, draw_quickly(pipe, prompts), strict=True)
    ]


def judged_cell(right: list[bool], exact: list[bool]) -> str:
    """Returns the cell of the column `judged` for a model whose pictures are `right`; the float model's are `exact`."""
    if not right:
        return ""
    pairs = list(zip(right, exact, strict=True))
    return f"{statistics.mean(right):.1%} (-{pairs.count((False, True))} +{pairs.count((True, False))})"


def main() -> None:
    options = arguments()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    held_out = list(read_prompts("demo-heldout").texts)
    calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]))
    held_out_calls = recorded(pipe, held_out[-options.held :])
    pictured = list(dict.fromkeys([*held_out, *map(str, split()[1])]))[: options.pictures]
    print(f"{len(calls)} calls, {len(held_out_calls)} held out", HEAD, sep="\n")
    starts: dict[tuple[bool, str], dict[str, float]] = {}  # layer errors by smoothing and kind of inputs
    exact = judged(pipe, pictured)
    if pictured:
        print(f"| float | | | | | | | | | {judged_cell(exact, exact)} |", flush=True)
    for name in options.rows:
        if name == COARSE:
            error = f"{sqnr(model, {}, held_out_calls, coarse(model)):.2f} dB"
            with coarse(model):
                print(f"| {name} | {error} | | | | | | | | {judged_cell(judged(pipe, pictured), exact)} |", flush=True)
            continue
        plain = forwards(model, calls)
        began = time.perf_counter()
        result = calibrate(model, lambda: calls, Settings(defaults=SD3.keep_float, groups=SD3.groups, **ROWS[name]))
        seconds = time.perf_counter() - began
        layer_sqnrs = [row["sqnr"] for row in result.report["layers"] if row["scheme"] and row.get("sqnr") is not None]
        cells = [f"{sqnr(model, result.layers, held_out_calls):.2f} dB"]
        cells += [f"{statistics.mean(layer_sqnrs):.1f}", f"{min(layer_sqnrs):.1f}"]
        errors = {row["name"]: row["mse"] for row in result.report["layers"] if row["scheme"] and row.get("mse")}
        kind = ROWS[name].get("smoothing", False), ROWS[name].get("activations", "static")
        start = starts.setdefault(kind, errors)
        ratio = statistics.median(errors[layer] / start[layer] for layer in errors if layer in start)
        cells += [f"{ratio:.2f} x", f"{seconds:.1f}", f"{seconds / plain:.2f} x", f"{peak_memory() / 2**20:.0f} MiB"]
        cells.append(size(result.report["totals"]["bytes_after"]))
        with quantized(model, {name: optimized(layer) for name, layer in result.layers.items()}):
            print(f"| {name} | {' | '.join(cells)} | {judged_cell(judged(pipe, pictured), exact)} |", flush=True)


if __name__ == "__main__":
    main()
