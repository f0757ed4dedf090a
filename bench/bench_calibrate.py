"""Measures the cost of calibration: the time of a replay with observers relative to plain forwards, and peak memory.

python bench/bench_calibrate.py                 the tables of observers, of recipes and of memory
python bench/bench_calibrate.py --only time     only the table of observers
python bench/bench_calibrate.py --only recipes  only the table of recipes

The table of recipes has the processor time of a calibration without its measurement of the SQNR.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import export
from octavo.calibrate.observers.observers import OBSERVERS, Options
from octavo.calibrate.plan import make_plan
from octavo.calibrate.replay.calls import evaluating, run
from octavo.calibrate.replay.hooks import observe
from octavo.calibrate.resources import peak_memory
from octavo.calibrate.settings import RECIPES, Settings
from octavo.pipelines.sd3 import SD3

# width, layers and heads of the models of the time table
MODELS = {"160 wide, 4 layers": (160, 4, 5), "768 wide, 6 layers": (768, 6, 12)}
CALLS = 16  # calls that are replayed
RECIPE_MODEL, RECIPE_CALLS = (256, 6, 8), 28  # width, layers and heads, and number of calls, of the table of recipes
REPEATS = 9  # repetitions of each measurement of time


class Call(NamedTuple):
    args: tuple
    kwargs: dict


def make_model(width: int, layers: int, heads: int) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=192,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    ).eval()


def make_calls(count: int) -> list[Call]:
    """Makes calls of 256 image and 64 text tokens with batch 2, as for 32 x 32 latents and classifier-free guidance."""
    torch.manual_seed(1)
    return [
        Call(
            (),
            {
                "hidden_states": torch.randn(2, 4, 32, 32),
                "encoder_hidden_states": torch.randn(2, 64, 192),
                "pooled_projections": torch.randn(2, 128),
                "timestep": torch.full((2,), 1000.0 * (1 - index / count)),
                "return_dict": False,
            },
        )
        for index in range(count)
    ]


class Seconds(NamedTuple):
    wall: float
    processor: float


def seconds(work: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def plain(model: nn.Module, calls: list[Call]) -> None:
    with evaluating(model):
        for position, call in enumerate(calls):
            run(model, call, position)


def observed(model: nn.Module, calls: list[Call], names: tuple[str, ...], observer: str) -> None:
    observers = {name: OBSERVERS[observer](Options()) for name in names}
    observe(model, observers, calls)
    for layer_observer in observers.values():
        layer_observer.range()


def time_table(repeats: int) -> None:
    print(f"{'model':<22}{'observer':<12}{'plain':>10}{'observed':>11}{'ratio':>8}{'processor':>11}")
    for name, shape in MODELS.items():
        model, calls = make_model(*shape), make_calls(CALLS)
        names = make_plan(model, defaults={}).quantized
        for observer in OBSERVERS:
            one, other = partial(plain, model, calls), partial(observed, model, calls, names, observer)
            one(), other()
            pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
            before, after = (statistics.median(run.wall for run in runs) for runs in zip(*pairs, strict=True))
            wall = statistics.median(b.wall / a.wall for a, b in pairs)
            processor = statistics.median(b.processor / a.processor for a, b in pairs)
            times = f"{before * 1000 / CALLS:>7.1f} ms{after * 1000 / CALLS:>8.1f} ms"
            print(f"{name:<22}{observer:<12}{times}{wall:>8.2f}{processor:>11.2f}", flush=True)


def recipe_table(repeats: int) -> None:
    model, calls = make_model(*RECIPE_MODEL).requires_grad_(False), make_calls(RECIPE_CALLS)
    print(f"{'recipe':<10}{'plain forwards':>16}{'calibration':>14}{'ratio':>8}")
    for name, recipe in RECIPES.items():
        settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, sqnr_calls=0, **recipe)
        one, other = partial(plain, model, calls), partial(calibrate, model, lambda: calls, settings)
        one(), other()
        pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
        before, after = (statistics.median(run.processor for run in runs) for runs in zip(*pairs, strict=True))
        ratio = statistics.median(b.processor / a.processor for a, b in pairs)
        print(f"{name:<10}{before:>14.2f} s{after:>12.2f} s{ratio:>8.2f}", flush=True)


def memory_child(directory: Path, dtype: str, work: str) -> None:
    """Prints the peak memory of this process, which loads the model and runs one call, or calibrates and exports it."""
    kind = getattr(torch, dtype)
    calls = [Call((), {k: v.to(kind) if torch.is_tensor(v) else v for k, v in c.kwargs.items()}) for c in make_calls(4)]
    model = SD3Transformer2DModel.from_pretrained(directory, torch_dtype=kind)
    if work == "plain":
        with evaluating(model):
            run(model, calls[0], 0)
    else:
        settings = Settings(observer=work, defaults={}, release=True, sqnr_calls=2)
        result = calibrate(model, lambda: calls, settings)
        export(result, model, directory / work, overwrite=True)
    print(peak_memory())


def memory_table(repeats: int) -> None:
    """Prints the median and the largest peak of several runs, which differ because malloc fragments the heap."""
    print(f"{'model':<22}{'dtype':<10}{'work':<12}{'median':>10}{'largest':>11}{'ratio':>8}{'of largest':>12}")
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            make_model(1024, 6, 16).to(getattr(torch, dtype)).save_pretrained(folder)
            bar: list[float] = []
            for work in ("plain", "minmax", "sigma", "mse"):
                command = [sys.executable, __file__, "--child", folder, dtype, work]
                runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
                peaks = [int(done.stdout.split()[-1]) for done in runs]
                middle, largest = statistics.median(peaks), max(peaks)
                bar = bar or [middle, min(peaks)]
                columns = (
                    f"{int(middle) >> 20:>6} MiB{largest >> 20:>7} MiB{middle / bar[0]:>8.2f}{largest / bar[1]:>12.2f}"
                )
                print(f"{'1024 wide, 6 layers':<22}{dtype:<10}{work:<12}{columns}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["time", "recipes", "memory"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--memory-repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory_child(Path(options.child[0]), *options.child[1:])
        return
    if options.only in (None, "time"):
        time_table(options.repeats)
    if options.only in (None, "recipes"):
        recipe_table(options.repeats)
    if options.only in (None, "memory"):
        memory_table(options.memory_repeats)


if __name__ == "__main__":
    main()
