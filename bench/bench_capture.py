"""Measures the cost of capturing: slowdown of a run, size and speed of the store, memory for more and more prompts.

python -m bench.bench_capture [--rounds 7]
"""

import argparse
import resource
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from octavo.capture.recorder import Clock, Recorder
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import Call, CaptureWriter
from octavo.pipelines import family_of
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.run import RunSettings, call_arguments, run_prompt
from octavo.prompts import read_prompts


def overhead(rounds: int, folder: Path) -> tuple[float, float, float]:
    """Measures runs of the bundled pipeline in 28 steps; returns median seconds alone, with recording, and ratio."""
    pipe = load_pipeline(model_directory("demo"))
    texts = read_prompts("demo").texts
    arguments = call_arguments(pipe, family_of(type(pipe).__name__), RunSettings())

    writer = CaptureWriter.create(folder / "overhead", {"prompts": rounds})

    def run_recorded(number: int) -> None:
        with writer.unit(number, {"prompt": texts[number]}) as unit, Recorder(pipe.transformer, unit, clock=Clock()):
            run_prompt(pipe, texts[number], arguments, 0)

    run_prompt(pipe, texts[0], arguments, 0)
    plain_times, recorded_times = [], []
    for number in range(rounds):
        began = time.perf_counter()
        run_prompt(pipe, texts[number], arguments, 0)
        middle = time.perf_counter()
        run_recorded(number)
        plain_times.append(middle - began)
        recorded_times.append(time.perf_counter() - middle)
    writer.close()
    ratios = [b / a for a, b in zip(plain_times, recorded_times, strict=True)]
    return statistics.median(plain_times), statistics.median(recorded_times), statistics.median(ratios)


def sd3_calls(prompts: int, steps: int) -> Any:
    """Yields pairs (prompt, call) with the shapes of SD3 at 1024 x 1024 pixels, in float16 and with guidance."""
    for prompt in range(prompts):
        text, pooled = torch.randn(2, 333, 4096).half(), torch.randn(2, 2048).half()
        for step in range(steps):
            latents = torch.randn(1, 16, 128, 128).half().repeat(2, 1, 1, 1)
            kwargs = dict(hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled,
                          timestep=torch.full((2,), 1000.0 - step), return_dict=False)  # fmt: skip
            yield prompt, Call("transformer", step, step, 1000.0 - step, None, (), kwargs)


def store(folder: Path) -> tuple[int, int, float, float]:
    """Writes and reads 84 calls of SD3 at 1024 x 1024; returns raw bytes, stored bytes, seconds to write, to read."""
    calls = list(sd3_calls(3, 28))
    began = time.perf_counter()
    with CaptureWriter.create(folder / "sd3", {"prompts": 3}) as writer, ExitStack() as stack:
        for prompt in range(3):
            with writer.unit(prompt, {"prompt": prompt}) as unit:
                for owner, call in calls:
                    if owner == prompt:
                        unit.add(call)
        writer.complete()
        del stack
    written = time.perf_counter()
    capture = Capture.open(folder / "sd3")
    count = sum(1 for _ in capture.calls())
    assert count == len(calls)
    read = time.perf_counter()
    raw, stored = sum(u.raw_bytes for u in capture.units), sum(u.stored_bytes for u in capture.units)
    return raw, stored, written - began, read - written


def growth(folder: Path, prompts: int = 40) -> list[float]:
    """Writes small units; returns the peak resident MiB after a tenth, half and all of the prompts."""
    peaks = []
    with CaptureWriter.create(folder / "growth", {"prompts": prompts}) as writer:
        for prompt in range(prompts):
            with writer.unit(prompt, {"prompt": prompt}) as unit:
                for _, call in sd3_calls(1, 4):
                    unit.add(call)
            if prompt + 1 in (prompts // 10, prompts // 2, prompts):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peaks = growth(folder)
        plain, recording, ratio = overhead(rounds, folder)
        raw, stored, write, read = store(folder)
    mib = 2**20
    print("| what | measured | bar |\n|---|---|---|")
    what = f"run with recording : run alone, bundled pipeline, 28 steps, median of {rounds}"
    print(f"| {what} | {ratio:.3f} x ({recording:.2f} s : {plain:.2f} s) | < 1.03 x |")
    sizes = f"{raw / mib:.0f} MiB, {stored / mib:.0f} MiB ({raw / stored:.1f}x smaller)"
    print(f"| 84 calls of SD3 at 1024 px: inputs, on disk | {sizes} | |")
    print(f"| writing, bytes of inputs | {raw / mib / write:.0f} MiB/s | |")
    print(f"| reading, bytes of inputs, every digest checked | {raw / mib / read:.0f} MiB/s | |")
    print(
        f"| peak resident memory after 4, 20, 40 prompts | {', '.join(f'{p:.0f}' for p in peaks)} MiB | does not grow |"
    )


if __name__ == "__main__":
    main()
