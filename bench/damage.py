"""Damages checkpoints, captures and other input files, and counts how the commands end that read them.

    python -m bench.damage flips [--count 376]     single flipped bits, over all files of a checkpoint of each format
    python -m bench.damage cost                    the time of computing digests, beside the time of loading
    python -m bench.damage mutations [--count 1]   truncated, swapped and rewritten files; JSON with other values

After a flip no command may accept the file: inspect must report the damage, generate and compare must refuse to run.
After a mutation no command may end with exit code 1, take more than 20 seconds of processor time, or use more than
1 GiB of additional memory. All commands run in this process, on tiny models.
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

from bench.bench_load import write_models
from octavo.calibrate import Calibrator, QuantConfig
from octavo.calibrate.formats.manifest import verify
from octavo.calibrate.formats.onnx.write import write_all
from octavo.capture.fingerprint import Origin
from octavo.capture.pth.pth import save_pth
from octavo.capture.store.reader import Capture
from octavo.cli import main as octavo
from tests.helpers.damage import Changes, bytes_changed, flipped, header_changed, json_changed, sealed_changed
from tests.zoo.whole_sd3 import whole_sd3

SECONDS, MEMORY = 20.0, 1 << 30  # most processor time and additional memory (bytes) that a command may use
LONGEST = 120.0  # most seconds of wall-clock time, for a command that waits and does not compute
SMALL = ("--steps", "1", "--height", "16", "--width", "16", "--device", "cpu")


class Hung(BaseException):
    """Raised in a command that takes longer than SECONDS of processor time, or LONGEST."""


class Done(NamedTuple):
    """The result of a command: exit code, output, seconds, and the bytes of memory that it used in addition."""

    code: int
    output: str
    seconds: float
    memory: int


def run(*arguments: object) -> Done:
    """Runs a command in this process. The exit code is -1 if the command hangs, 1 if it raises an exception."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung

    before, began = _memory("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of memory
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
    """Returns an entry of /proc/self/status, such as VmRSS, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


class Subject(NamedTuple):
    """An undamaged directory, and a function that yields the commands that read a directory of its kind."""

    name: str
    directory: Path
    commands: Callable[[Path], Iterator[tuple[object, ...]]]

    def files(self) -> list[Path]:
        """Lists all files of the directory, as paths relative to it."""
        return sorted(path.relative_to(self.directory) for path in self.directory.rglob("*") if path.is_file())


def prepared(folder: Path) -> tuple[Path, Path, list[Subject]]:
    """Makes a tiny pipeline, a capture of it, and a checkpoint in each format."""
    model, captured = whole_sd3(folder), folder / "captured"
    (folder / "prompts.txt").write_text("a red circle\na blue ring")
    _run_or_exit("capture", model, captured, "--prompts", folder / "prompts.txt", *SMALL)
    out = folder / "drawn.png"

    def denoiser(path: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", path
        yield "generate", path, "a ring", "-o", out, "--overwrite", *SMALL
        yield "compare", model, path, "-o", out.with_suffix(".html"), "--overwrite", "--limit", 1, *SMALL

    def other(path: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", path

    subjects = []
    for formats in ("ascend", "diffusers", "torchao", "ascend,diffusers,torchao"):
        directory = folder / formats.replace(",", "-")
        _run_or_exit(
            "calibrate", captured, directory, "--format", formats, "--accuracy", "plain", "--max-shard-size", "100KB"
        )
        subjects.append(Subject(formats, directory, other if formats == "torchao" else denoiser))
    directory = folder / "onnx"
    graphs = ("--input-shape", "2,3,32,32", "--format", "ascend,onnx,ascend-onnx", "--accuracy", "plain")
    _run_or_exit("calibrate-cnn", "digits", directory, *graphs)
    subjects.append(Subject("ascend,onnx,ascend-onnx", directory, other))
    for name, write in (("ranks", _ranks), ("external-data", _external)):
        write(_calibrated(), folder / name)
        subjects.append(Subject(name, folder / name, other))
    return model, captured, subjects


def _calibrated() -> Calibrator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    calibrator = Calibrator(model.eval(), QuantConfig(quant_mode=1), [[torch.randn(2, 3, 9, 9)]])
    calibrator.run()
    return calibrator


def _ranks(calibrator: Calibrator, folder: Path) -> None:
    """Writes two pairs of files, as two ranks of MindIE-SD read them, beside a file of the user."""
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for rank in range(2):
        names = f"quant_model_weight_w8a8_{rank}.safetensors", f"quant_model_description_w8a8_{rank}.json"
        calibrator.export_quant_safetensor(folder, *names)


def _external(calibrator: Calibrator, folder: Path) -> None:
    write_all(calibrator.result.layers, calibrator.model, folder, "net", calibrator.result.example, largest=100)


def _run_or_exit(*arguments: object) -> None:
    result = CliRunner().invoke(octavo, [str(argument) for argument in arguments])
    if result.exit_code:
        raise SystemExit(f"{arguments}: {result.output}")


def replaced(path: Path, content: bytes) -> None:
    """Replaces a file, even if it is read-only."""
    path.unlink()
    path.write_bytes(content)


def outcomes(subject: Subject, file: Path, content: bytes) -> Iterator[tuple[str, Done]]:
    """Runs all commands of a subject while `file` has this content, then restores the file.

    Yields the name and the result of each command.
    """
    path = subject.directory / file
    sound = path.read_bytes()
    replaced(path, content)
    for command in subject.commands(subject.directory):
        yield str(command[0]), run(*command)
    replaced(path, sound)


@click.group()
def main() -> None:
    """Damages files, and counts how the commands end that read them."""
    torch.set_num_threads(1)


@main.command()
@click.option("--count", default=376, show_default=True, help="Number of bits to flip.")
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
    print(f"{count} flips in {len(places)} files of {len(subjects)} checkpoints; not refused: {dict(wrong)}")
    sys.exit(bool(wrong))


def changes_of(path: Path, rng: random.Random, count: int) -> Changes:
    """Yields the changes to try on a file: changes of its bytes, and of any JSON in it."""
    content = path.read_bytes()
    yield from bytes_changed(content, rng)
    if content.startswith(b'{"sha256": "'):
        yield from sealed_changed(content, rng, count)
    elif path.suffix == ".json":
        yield from json_changed(content, rng, count)
    elif path.suffix == ".safetensors":
        yield from header_changed(content, rng, count)


@main.command()
@click.option(
    "--count", default=1, show_default=True, help="Number of places in a JSON file at which each value is tried."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--only", default="", help="Only subjects whose names contain this text.")
@click.option("--most", default=10**9, help="Most mutations of each subject, chosen at random.")
def mutations(count: int, seed: int, only: str, most: int) -> None:
    """Rewrite files of directories with and without a manifest."""
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
    """Yields for each mutation: the subject, the path of the file, the name of the change, and the content."""
    model, captured, checkpoints = prepared(folder)
    for subject in [*checkpoints, *_bare(checkpoints), *_others(folder, model, captured)]:
        if only in subject.name:
            mutations_of_subject = [
                (subject, file, changed, content)
                for file in subject.files()
                for changed, content in changes_of(subject.directory / file, rng, count)
            ]
            yield from rng.sample(mutations_of_subject, min(most, len(mutations_of_subject)))


@main.command()
def cost() -> None:
    """Measure the processor seconds of computing digests, and of loading."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(("int8", "float32"), 4, 24, Path(folder), "10GB")
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
    """Runs `work`, prints the processor seconds that it took, and returns its result."""
    began = time.process_time()
    value = work()
    print(f"{name}: {time.process_time() - began:.2f} s", flush=True)
    return value


@torch.no_grad()
def forward(model: Any) -> None:
    """Runs an SD3 transformer on 256 tokens."""
    config = model.config
    prompt, pooled = torch.randn(1, 77, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
    model(torch.randn(1, 16, 32, 32), prompt, pooled, torch.tensor([500.0]))


def _bare(checkpoints: list[Subject]) -> Iterator[Subject]:
    """Yields copies of the checkpoints without manifests, to test the checks that do not use the manifest."""
    for subject in checkpoints:
        copy = subject.directory.with_name(subject.directory.name + "-bare")
        shutil.copytree(subject.directory, copy)
        for path in copy.rglob("octavo*.manifest"):
            path.unlink()
        yield subject._replace(name=f"bare {subject.name}", directory=copy)


def _others(folder: Path, model: Path, captured: Path) -> Iterator[Subject]:
    """Yields a capture, a pipeline, and the other input files of commands."""
    out, inputs = folder / "other-out", folder / "inputs"
    inputs.mkdir()

    def capture(path: Path) -> Iterator[tuple[object, ...]]:
        yield "inspect", path
        yield "calibrate", path, out, "--overwrite", "--accuracy", "plain", "--device", "cpu"

    yield Subject("capture", captured, capture)
    save_pth(inputs / "samples.pth", Capture.open(captured).calls())
    (inputs / "prompts.txt").write_text("a red circle")

    def convert(path: Path) -> Iterator[tuple[object, ...]]:
        for command in (
            ("convert-pth", path / "samples.pth", out),
            ("capture", model, out, "--prompts", path / "prompts.txt", "--limit", 1, *SMALL),
        ):
            shutil.rmtree(out, ignore_errors=True)
            yield command

    yield Subject("inputs", inputs, convert)

    def pipeline(path: Path) -> Iterator[tuple[object, ...]]:
        yield "generate", path, "a ring", "-o", folder / "drawn.png", "--overwrite", *SMALL

    yield Subject("pipeline", model, pipeline)


if __name__ == "__main__":
    main()
