"""Measures `octavo calibrate --memory` on a Stable Diffusion 3 medium with random weights.

python bench/bench_big.py              the whole configuration: 24 layers, 1536 wide, 2 B parameters, 4 GB in bfloat16
python bench/bench_big.py --layers 3   a smaller model

Makes the pipeline directory and a capture of 8 calls in a scratch directory. Prints time and peak resident memory of
three processes:
1. plain forwards of the calls, with memory-mapped weights
2. calibration, with export for Ascend and for diffusers, in files of at most `--max-shard-size`
3. `from_pretrained` of the diffusers files, and one call
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import SD3Transformer2DModel

from octavo.calibrate.blockwise.parking import Parking
from octavo.calibrate.plan import block_names
from octavo.calibrate.replay.calls import evaluating, run
from octavo.calibrate.resources import peak_memory
from octavo.capture.fingerprint import fingerprint
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import Call, CaptureWriter
from octavo.pipelines.load import mapped_denoiser
from octavo.pipelines.sd3 import SD3

WIDTH, HEADS = 1536, 24  # those of Stable Diffusion 3 medium


def make(folder: Path, layers: int, calls: int, batch: int, latents: int) -> None:
    """Writes the pipeline directory `model` and the capture `captured` below `folder`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=4096,
        caption_projection_dim=WIDTH, pooled_projection_dim=2048, pos_embed_max_size=192,
    ).eval()  # fmt: skip
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model" / "transformer", max_shard_size="1GB")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", type(model).__name__]}
    (folder / "model" / "model_index.json").write_text(json.dumps(index))
    del model
    write_capture(folder, fingerprint(mapped_denoiser(folder / "model", "transformer", SD3)), calls, batch, latents)


def write_capture(folder: Path, captured: dict[str, str], calls: int, batch: int, latents: int) -> None:
    """Writes a capture of `calls` prompts with one call each, for pictures of 8 x `latents` pixels a side.

    A call has `batch` rows and 333 text tokens.
    """
    manifest = {
        "pipeline": "StableDiffusion3Pipeline", "family": "sd3", "model": str(folder / "model"), "dtype": "bfloat16",
        "components": {"transformer": captured}, "settings": {}, "prompts": calls,
    }  # fmt: skip
    with CaptureWriter.create(folder / "captured", manifest) as writer:
        for index in range(calls):
            level = 1000.0 * (1 - index / calls)
            kwargs = {
                "hidden_states": torch.randn(batch, 16, latents, latents).bfloat16(),
                "encoder_hidden_states": torch.randn(batch, 333, 4096).bfloat16(),
                "pooled_projections": torch.randn(batch, 2048).bfloat16(),
                "timestep": torch.full((batch,), level),
                "return_dict": False,
            }
            with writer.unit(index, {"prompt": f"prompt {index}"}) as unit:
                unit.add(Call("transformer", 0, 0, level, None, (), kwargs))
        writer.complete()


def plain(folder: Path) -> None:
    """Runs all calls, dropping the weights of each block from memory after it ran; prints seconds and peak memory."""
    model = mapped_denoiser(folder / "model", "transformer", SD3)
    parking = Parking(folder, torch.device("cpu"))
    for name in block_names(model):
        block = model.get_submodule(name)
        block.register_forward_pre_hook(lambda block, _, name=name: parking.fetch(name, block))
        block.register_forward_hook(lambda *_, name=name: parking.park(name))
    began = time.perf_counter()
    with evaluating(model):
        for position, call in enumerate(Capture.open(folder / "captured").calls()):
            run(model, call, position)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory()}))


def calibrate(folder: Path, *options: str) -> None:
    """Runs `octavo calibrate` with these options, and prints its seconds and peak memory."""
    from octavo.cli import main as octavo

    began = time.perf_counter()
    octavo(
        ["calibrate", str(folder / "captured"), str(folder / "w8a8"), "--format", "ascend,diffusers", *options],
        standalone_mode=False,
    )
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_memory()}))


def load(folder: Path) -> None:
    """Loads the checkpoint with diffusers and runs one call; prints the seconds of loading and the memory."""
    import octavo  # noqa: F401 - registers Octavo's quantizer with diffusers

    call = next(iter(Capture.open(folder / "captured").calls()))
    importlib.import_module("accelerate"), importlib.import_module("diffusers.quantizers.auto")
    before, began = peak_memory(), time.perf_counter()
    model = SD3Transformer2DModel.from_pretrained(folder / "w8a8").eval()
    measurements = {"before": before, "seconds": time.perf_counter() - began, "peak": peak_memory()}
    run(model.requires_grad_(False), call, 0)
    print(json.dumps(measurements | {"after": peak_memory()}))


def process(*arguments: object) -> dict[str, float]:
    """Runs this file with these arguments in another process; returns the last line it prints, parsed as JSON."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    measurements: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--accuracy", default="fast")
    parser.add_argument("--max-shard-size", default="500MB")
    parser.add_argument("--scratch", help="directory for all files, 2.5 times the model's size")
    parser.add_argument("--child", choices=["plain", "calibrate", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "plain":
        return plain(options.folder)
    calibrate_options = "--memory", options.memory, "--accuracy", options.accuracy
    calibrate_options += "--max-shard-size", options.max_shard_size
    if options.child == "calibrate":
        return calibrate(options.folder, *calibrate_options)
    if options.child == "load":
        return load(options.folder)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        make(folder, options.layers, options.calls, options.batch, options.latents)
        weights = sum(file.stat().st_size for file in (folder / "model" / "transformer").iterdir())
        print(f"{options.layers} layers, {weights / 1e9:.2f} GB of weights, {options.calls} calls", flush=True)
        forwards = process("--child", "plain", "--folder", folder)
        print(f"plain forwards   {forwards['seconds']:>8.0f} s  {int(forwards['peak']) >> 20:>6} MiB", flush=True)
        calibration = process("--child", "calibrate", "--folder", folder, *calibrate_options)
        ratio = calibration["seconds"] / forwards["seconds"]
        peak = int(calibration["peak"]) >> 20
        print(f"calibrate        {calibration['seconds']:>8.0f} s  {peak:>6} MiB  x {ratio:.2f}")
        print(json.loads((folder / "w8a8" / "report.json").read_text())["seconds"], flush=True)
        print(line_of(process("--child", "load", "--folder", folder), folder / "w8a8"))


def line_of(loaded: dict[str, float], folder: Path) -> str:
    """Formats the time and memory of loading, and their ratio to the size of the files."""
    shards = [file.stat().st_size for file in folder.glob("diffusion_*.safetensors")]
    before, peak, after_call = (int(loaded[key]) >> 20 for key in ("before", "peak", "after"))
    whole = sum(shards) >> 20
    return (
        f"from_pretrained  {loaded['seconds']:>8.1f} s  {peak:>6} MiB, {before} of them before: "
        f"x {(peak - before) / whole:.2f} of the {whole} MiB in {len(shards)} files of at most {max(shards) >> 20}; "
        f"x {(after_call - before) / whole:.2f} after a call"
    )


if __name__ == "__main__":
    main()
