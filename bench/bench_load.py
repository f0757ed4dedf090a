"""Measures the seconds and the memory of loading a model with diffusers, in int8 and in float.

    python -m bench.bench_load [--layers 4] [--heads 24] [--rounds 5]
    python -m bench.bench_load --layers 24 --rounds 1 --max-shard-size 500MB int8   the whole of SD3-medium, in shards

Quantizes and writes an SD3 transformer with random weights. Each load runs in a process of its own, with the files in
the page cache. Float tensors of the int8 model are bfloat16. Memory is the growth of VmHWM from the end of the imports
to the end of loading, and to the end of one forward of 256 tokens.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.install import install
from octavo.calibrate.layers.scheme import ACTIVATION, Range, qparams_of
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

KINDS = ("float32", "bfloat16", "int8")
LOAD = """
import json, sys, time
import torch, octavo
from diffusers import SD3Transformer2DModel as Model
import diffusers.quantizers.auto, accelerate
from octavo.calibrate.resources import peak_memory
before = peak_memory()
began = time.perf_counter()
dtype = getattr(torch, sys.argv[2])
model = Model.from_pretrained(sys.argv[1], torch_dtype=dtype)
loading, loaded = time.perf_counter() - began, peak_memory()
config = model.config
with torch.no_grad():
    model(torch.randn(1, 16, 32, 32).to(dtype), torch.randn(1, 77, config.joint_attention_dim).to(dtype),
          torch.randn(1, config.pooled_projection_dim).to(dtype), torch.tensor([500.0]))
print(json.dumps([loading, time.perf_counter() - began, loaded - before, peak_memory() - before]))
"""


def write_models(kinds: Sequence[str], layers: int, heads: int, folder: Path, shard: str) -> None:
    """Writes the models named in `kinds`. Replaces float layers by integer ones one at a time, to save memory."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if "float32" in kinds else torch.bfloat16)
    model = SD3Transformer2DModel(
        sample_size=32, num_layers=layers, attention_head_dim=64, num_attention_heads=heads,
        caption_projection_dim=64 * heads, pos_embed_max_size=32,
    ).requires_grad_(False)  # fmt: skip
    torch.set_default_dtype(torch.float32)
    if "float32" in kinds:
        model.save_pretrained(folder / "float32", max_shard_size=shard)
    model.to(torch.bfloat16)
    if "bfloat16" in kinds:
        model.save_pretrained(folder / "bfloat16", max_shard_size=shard)
    qparams = qparams_of(Range(-6.0, 6.0), ACTIVATION, torch.bfloat16)
    integer_layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "transformer_blocks" in name:
            integer = layer_of(module, Choice(StaticInput(qparams)))
            assert not isinstance(integer, str)
            integer_layers[name] = integer
            install(model, {name: integer})
    if "int8" in kinds:
        export(Result(Plan(()), integer_layers, {}), model, folder / "int8", ("diffusers",), max_shard_size=shard)


def time_loading(folder: Path, dtype: str) -> list[float]:
    """Loads a model in another process; returns seconds to load and to the first output, and bytes after each."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), dtype], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


@click.command()
@click.option("--layers", default=4)
@click.option("--heads", default=24)
@click.option("--rounds", default=5)
@click.option("--max-shard-size", default="10GB")
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS))
def main(kinds: tuple[str, ...], layers: int, heads: int, rounds: int, max_shard_size: str) -> None:
    """Prints a table with a row for each kind of model."""
    kinds = kinds or KINDS
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_models(kinds, layers, heads, folder, max_shard_size)
        runs: dict[str, Any] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for name, measurements in runs.items():
                measurements.append(time_loading(folder / name, "bfloat16" if name == "int8" else name))
        print("| | file | load | first output | memory after loading | after a forward |\n|---|---|---|---|---|---|")
        for name, measurements in runs.items():
            size = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
            seconds, output, after, after_call = (median(column) for column in zip(*measurements, strict=True))
            memory = " | ".join(f"{peak / 2**20:.0f} MiB, {peak / size:.2f} x the file" for peak in (after, after_call))
            print(f"| {name} | {size / 2**20:.0f} MiB | {seconds:.2f} s | {output:.2f} s | {memory} |")


if __name__ == "__main__":
    main()
