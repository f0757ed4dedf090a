"""Compares an SD3 transformer that Octavo quantized to 8 bits with those of other libraries: speed and errors.

    python -m venv peers
    peers/bin/pip install -e . psutil torchao optimum-quanto onnx onnxscript onnxruntime openvino
    OMP_NUM_THREADS=2 peers/bin/python -m bench.peers [--tokens 1024 4096] [--rounds 3] [--compile] [--only torchao ...]

Each library runs in a process of its own, in which calls of its model and of Octavo's model alternate; the ratio is
that of the medians in this process. All libraries quantize the linear layers that Octavo quantizes. The error is the
energy of the difference to the float32 output, relative to the energy of that output, in dB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .bench_runtime import call_of, make_models
from .peer_models import PEERS, Model, Stored

LIMIT = 300  # most seconds for the process of one library


def store(folder: Path, tokens: list[int], layers: int) -> None:
    """Writes the float model, the int8 model and the float model's outputs."""
    models = make_models("static", layers)
    torch.save(models["float32"][0], folder / Stored.FLOAT)
    torch.save(models["int8"][0], folder / Stored.INT8)
    with torch.inference_mode():
        outputs = {count: models["float32"][0](**call_of(count).kwargs)[0] for count in tokens}
    torch.save(outputs, folder / Stored.OUTPUTS)


def measure(models: dict[str, Model], rounds: int) -> dict[str, list[float]]:
    """Measures the seconds of alternating calls of the models, after a warm-up call of each."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_index in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model()
            if round_index:
                times[name].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def child(name: str, folder: Path, tokens: int, rounds: int, ours: str) -> dict[str, float]:
    """Measures median seconds and errors in dB of the model of library `name`, and of Octavo's model."""
    models = {"peer": PEERS[name](folder, tokens), "octavo": PEERS[ours](folder, tokens)}
    wanted = torch.load(folder / Stored.OUTPUTS)[tokens]
    measurements = {}
    for key, model in models.items():
        error = (model().float() - wanted).double()
        measurements[f"{key} error"] = float(10 * torch.log10(error.square().sum() / wanted.double().square().sum()))
    return measurements | {key: statistics.median(seconds) for key, seconds in measure(models, rounds).items()}


def run(name: str, folder: Path, tokens: int, rounds: int, ours: str) -> dict[str, float] | str:
    """Runs `child` in another process; returns its measurements, or the reason why there are none."""
    command = [sys.executable, "-m", "bench.peers", "--child", name, str(folder), str(tokens), str(rounds), ours]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        return f"not finished after {LIMIT} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or [f"exit {done.returncode}"])[-1][:160]
    measurements: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measurements


def row(name: str, measurements: dict[str, float] | str) -> str:
    """Formats a line of the table."""
    if isinstance(measurements, str):
        return f"| {name} | does not run: {measurements} | | |"
    ratio = measurements["peer"] / measurements["octavo"]
    return f"| {name} | {1000 * measurements['peer']:.0f} ms | {ratio:.2f} x | {measurements['peer error']:.1f} dB |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=list(PEERS), metavar="NAME", help="peers whose names contain this")
    parser.add_argument("--compile", action="store_true", help="compare with Octavo's model after torch.compile")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, tokens, rounds, ours = options.child
        print(json.dumps(child(name, Path(folder), int(tokens), int(rounds), ours)))
        return
    ours = "Octavo int8, torch.compile" if options.compile else "Octavo int8"
    names = [name for name in PEERS if name != ours and any(part in name for part in options.only)]
    with tempfile.TemporaryDirectory() as folder_name:
        store(Path(folder_name), options.tokens, options.layers)
        for tokens in options.tokens:
            print(f"\n| {tokens} tokens | median | relative to Octavo in the same process | error |\n|---|---|---|---|")
            octavo: list[dict[str, Any]] = []
            for name in names:
                measurements = run(name, Path(folder_name), tokens, options.rounds, ours)
                print(row(name, measurements), flush=True)
                octavo += [measurements] if isinstance(measurements, dict) else []
            if octavo:
                medians = {"peer": statistics.median(measurements["octavo"] for measurements in octavo), "octavo": 1.0}
                medians["octavo"], medians["peer error"] = medians["peer"], octavo[0]["octavo error"]
                print(row(ours, medians), flush=True)


if __name__ == "__main__":
    main()
