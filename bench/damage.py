"""Damages checkpoints, captures and other input files, and counts what the commands make of them.

    python -m bench.damage flips [--count 376]     single flipped bits, over all files of a checkpoint of each format
    python -m bench.damage cost                    seconds of digests beside those of loading
    python -m bench.damage mutations [--count 1]   truncated, swapped and rewritten files; JSON with other values

A flip must not be called sound, and must not be drawn or compared with. A mutation must not end in exit code 1, take
more than 20 seconds of the processor or 1 GiB above what the process has. All commands run in this process, on tiny
models.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import click
import torch
from click.testing import CliRunner
from diffusers import SD3Transformer2DModel
from torch import nn

from bench.bench_load import made
from octavo.calibrate import Calibrator, QuantConfig
from octavo.calibrate.formats.manifest import verify
from octavo.calibrate.formats.onnx.write import write_all
from octavo.capture.fingerprint import Origin
from octavo.capture.pth.pth import save_pth
from octavo.capture.store.reader import Capture
from octavo.cli import main as octavo
from tests.helpers.damage import Changes, bytes_changed, flipped, header_changed, json_changed, sealed_changed
from tests.zoo.whole_sd3 import whole_sd3

SECONDS, MEMORY = 20.0, 1 << 30  # the most processor time and memory that a command may take on a damaged file
LONGEST = 120.0  # seconds by the clock, for a command that waits and does not compute
SMALL = ("--steps", "1", "--height", "16", "--width", "16", "--device", "cpu")


class Hung(BaseException):
    """A command took longer than SECONDS."""


class Done(NamedTuple):
    """A command that ended: its exit code, its output, its seconds, and the memory it took, in bytes."""

    code: int
    output: str
    seconds: float
    memory: int


def run(*arguments: object) -> Done:
    """Runs a command in this process. Its exit code is -1 where it hangs, 1 where it raises."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung

    before, began = _memory("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, LONGEST))
    for timer, number, limit in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, limit)
    try:
        result = CliRunner().invoke(octavo, [str(argument) for argument in arguments])
        code, output = result.exit_code, result.output
    except Hung:
        code, output = -1, "took too long"
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
    return Done(code, output, time.monotonic() - began, _memory("VmHWM") - before)


def _memory(name: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


class Subject(NamedTuple):
    """A sound directory, and the commands that read it from the place of a damaged copy."""

    name: str
    directory: Path
    commands: Callable[[Path], Iterator[tuple[object, ...]]]

    def files(self) -> list[Path]:
        """Lists the files, each by its path below the directory."""
        return sorted(path.relative_to(self.directory) for path in self.directory.rglob("*") if path.is_file())


def prepared(folder: Path) -> tuple[Path, Path, list[Subject]]:
    """Makes a pipeline, its capture, and a checkpoint of each format."""
    model, captured = whole_sd3(folder), folder / "captured"
    (folder / "prompts.txt").write_text("a red circle\na blue ring")
    _made("capture", model, captured, "--prompts", folder / "prompts.txt", *SMALL)
    out = folder / "drawn.png"

    def denoiser(place: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", place
        yield "generate", place, "a ring", "-o", out, "--overwrite", *SMALL
        yield "compare", model, place, "-o", out.with_suffix(".html"), "--overwrite", "--limit", 1, *SMALL

    def other(place: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", place

    subjects = []
    for formats in ("ascend", "diffusers", "torchao", "ascend,diffusers,torchao"):
        made = folder / formats.replace(",", "-")
        _made("calibrate", captured, made, "--format", formats, "--accuracy", "plain", "--max-shard-size", "100KB")
        subjects.append(Subject(formats, made, other if formats == "torchao" else denoiser))
    made = folder / "onnx"
    graphs = ("--input-shape", "2,3,32,32", "--format", "ascend,onnx,ascend-onnx", "--accuracy", "plain")
    _made("calibrate-cnn", "digits", made, *graphs)
    subjects.append(Subject("ascend,onnx,ascend-onnx", made, other))
    for name, write in (("ranks", _ranks), ("external-data", _external)):
        write(_calibrated(), folder / name)
        subjects.append(Subject(name, folder / name, other))
    return model, captured, subjects


def _calibrated() -> Calibrator:
    """A small network of convolutions, calibrated on noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    calibrator = Calibrator(model.eval(), QuantConfig(quant_mode=1), [[torch.randn(2, 3, 9, 9)]])
    calibrator.run()
    return calibrator


def _ranks(calibrator: Calibrator, folder: Path) -> None:
    """Two pairs of files, as two ranks of MindIE-SD read them, beside a file of the user."""
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for rank in range(2):
        names = f"quant_model_weight_w8a8_{rank}.safetensors", f"quant_model_description_w8a8_{rank}.json"
        calibrator.export_quant_safetensor(folder, *names)


def _external(calibrator: Calibrator, folder: Path) -> None:
    """Graphs whose tensors are in files of their own."""
    write_all(calibrator.result.layers, calibrator.model, folder, "net", calibrator.result.example, largest=100)


def _made(*arguments: object) -> None:
    result = CliRunner().invoke(octavo, [str(argument) for argument in arguments])
    if result.exit_code:
        raise SystemExit(f"{arguments}: {result.output}")


def replaced(path: Path, content: bytes) -> None:
    """Writes a file anew, whatever its mode."""
    path.unlink()
    path.write_bytes(content)


def outcomes(subject: Subject, file: Path, content: bytes) -> Iterator[tuple[str, Done]]:
    """Yields each command of a subject by name and how it ends while the file has this content; puts the file back."""
    path = subject.directory / file
    sound = path.read_bytes()
    replaced(path, content)
    for command in subject.commands(subject.directory):
        yield str(command[0]), run(*command)
    replaced(path, sound)


@click.group()
def main() -> None:
    """Damages files, and counts what the commands make of them."""
    torch.set_num_threads(1)


@main.command()
@click.option("--count", default=376, show_default=True, help="How many bits are flipped.")
@click.option("--seed", default=0, show_default=True)
def flips(count: int, seed: int) -> None:
    """Flip single bits in every file of every format."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        subjects = prepared(Path(folder))[2]
        places = [(subject, file) for subject in subjects for file in subject.files() if file.name != "notes.txt"]
        wrong: Counter[str] = Counter()
        refused: Counter[tuple[str, int]] = Counter()
        for number in range(count):
            subject, file = places[number % len(places)]
            sound = (subject.directory / file).read_bytes()
            bit = rng.randrange(8 * len(sound))
            for name, done in outcomes(subject, file, flipped(sound, bit)):
                refused[name, done.code] += 1
                if done.code in (-1, 0, 1):
                    wrong[name] += 1
                    print(f"{subject.name}: {file}, bit {bit}: {name} ends with {done.code}", flush=True)
        for (name, code), times in sorted(refused.items()):
            print(f"{name}: exit code {code} in {times} runs")
    print(f"{count} flips in {len(places)} files of {len(subjects)} checkpoints; called sound, or run: {dict(wrong)}")
    sys.exit(bool(wrong))


def changes_of(path: Path, rng: random.Random, count: int) -> Changes:
    """The changes that are tried on a file: of its bytes, and of the JSON that is in it."""
    content = path.read_bytes()
    yield from bytes_changed(content, rng)
    if content.startswith(b'{"sha256": "'):
        yield from sealed_changed(content, rng, count)
    elif path.suffix == ".json":
        yield from json_changed(content, rng, count)
    elif path.suffix == ".safetensors":
        yield from header_changed(content, rng, count)


@main.command()
@click.option("--count", default=1, show_default=True, help="Places in a file at which each value is tried.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", default="", help="Only subjects whose name has this in it.")
@click.option("--most", default=10**9, help="Of each subject, try so many, chosen at random.")
def mutations(count: int, seed: int, only: str, most: int) -> None:
    """Rewrite files, with the manifest beside them and without."""
    rng = random.Random(seed)
    codes: Counter[tuple[str, int]] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for subject, file, changed, content in _all_mutations(Path(folder), rng, count, only, most):
            for name, done in outcomes(subject, file, content):
                codes[name, done.code] += 1
                if done.code in (-1, 1) or "Traceback" in done.output or done.memory > MEMORY:
                    faults += 1
                    last = done.output.strip().splitlines()[-1:]
                    took = f"{done.seconds:.1f} s, {done.memory >> 20} MiB"
                    print(f"{subject.name}: {file}: {changed}: {name} {done.code}, {took}: {last}", flush=True)
    for (name, code), times in sorted(codes.items()):
        print(f"{name}: exit code {code} in {times} runs")
    print(f"{faults} faults")
    sys.exit(bool(faults))


def _all_mutations(
    folder: Path, rng: random.Random, count: int, only: str, most: int
) -> Iterator[tuple[Subject, Path, str, bytes]]:
    """Yields each damaged file: the subject, its path, what was done to it, and its content."""
    model, captured, checkpoints = prepared(folder)
    for subject in [*checkpoints, *_bare(checkpoints), *_others(folder, model, captured)]:
        if only in subject.name:
            found = [
                (subject, file, changed, content)
                for file in subject.files()
                for changed, content in changes_of(subject.directory / file, rng, count)
            ]
            yield from rng.sample(found, min(most, len(found)))


@main.command()
def cost() -> None:
    """Measure what digests cost beside loading, in seconds of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        made(("int8", "float32"), 4, 24, Path(folder), "10GB")
        out, exact = Path(folder) / "int8", Path(folder) / "float32"
        size = sum(path.stat().st_size for path in out.iterdir())
        timed(f"digests of a checkpoint of {size >> 20} MiB", lambda: verify(out))
        timed("sizes alone", lambda: verify(out, digests=False))
        load = partial(SD3Transformer2DModel.from_pretrained, torch_dtype=torch.float32)
        model = timed("from_pretrained, int8", lambda: load(out))
        timed("one forward of 256 tokens", lambda: forward(model))
        model = timed("from_pretrained, float32", lambda: load(exact))
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        origin = timed(f"fingerprint of {size >> 20} MiB for a manifest", lambda: Origin.of(model))
        timed("comparing the model with it", lambda: origin.other_weights(model))


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Runs `work`, and prints the seconds of the processor that it took."""
    began = time.process_time()
    found = work()
    print(f"{name}: {time.process_time() - began:.2f} s", flush=True)
    return found


@torch.no_grad()
def forward(model: Any) -> None:
    """One call of an SD3 transformer with 256 tokens."""
    config = model.config
    prompt, pooled = torch.randn(1, 77, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
    model(torch.randn(1, 16, 32, 32), prompt, pooled, torch.tensor([500.0]))


def _bare(checkpoints: list[Subject]) -> Iterator[Subject]:
    """Yields the same checkpoints without their manifests, so that the checks behind a manifest are tried too."""
    for subject in checkpoints:
        copy = subject.directory.with_name(subject.directory.name + "-bare")
        shutil.copytree(subject.directory, copy)
        for path in copy.rglob("octavo*.manifest"):
            path.unlink()
        yield subject._replace(name=f"bare {subject.name}", directory=copy)


def _others(folder: Path, model: Path, captured: Path) -> Iterator[Subject]:
    """A capture, a pipeline, and the other files that commands read."""
    out, inputs = folder / "other-out", folder / "inputs"
    inputs.mkdir()

    def capture(place: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", place
        yield "calibrate", place, out, "--overwrite", "--accuracy", "plain", "--device", "cpu"

    yield Subject("capture", captured, capture)
    save_pth(inputs / "samples.pth", Capture.open(captured).calls())
    (inputs / "prompts.txt").write_text("a red circle")

    def convert(place: Path) -> Iterator[tuple[object, ...]]:
        for command in (
            ("convert-pth", place / "samples.pth", out),
            ("capture", model, out, "--prompts", place / "prompts.txt", "--limit", 1, *SMALL),
        ):
            shutil.rmtree(out, ignore_errors=True)
            yield command

    yield Subject("inputs", inputs, convert)

    def pipeline(place: Path) -> Iterator[tuple[object, ...]]:
        yield "generate", place, "a ring", "-o", folder / "drawn.png", "--overwrite", *SMALL

    yield Subject("pipeline", model, pipeline)


if __name__ == "__main__":
    main()
