"""Measures the speed-up by several ranks: seconds of each stage of capture and calibrate, with 1 and several processes.

python -m bench.bench_ranks [--model demo] [--prompts 8] [--world 2] [--rounds 3] [--memory 4GiB]

Every process has one thread. Runs with one process and with several alternate; the table has the medians. Times include
loading the model and connecting the processes, but not starting Python and importing torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from octavo.capture.ranks import ranks_of_environment

ACCURACIES = ("plain", "fast", "balanced")


def done(world: int, *arguments: object) -> dict[str, Any]:
    """Runs an octavo command with `world` processes; returns the last JSON line that it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "octavo", *map(str, arguments), "--json", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads([line for line in ran.stdout.splitlines() if line.startswith("{")][-1])


def measured(options: argparse.Namespace, folder: Path, world: int, round_index: int) -> dict[tuple[str, str], float]:
    """Measures one round; returns seconds by (command, stage).

    The stage "" is the whole command. Under the stage "sent" is not a time, but the MiB that rank 0 sent.
    """
    seconds_of: dict[tuple[str, str], float] = {}
    store = folder / f"captured-{world}-{round_index}"
    arguments = ("--limit", options.prompts, *(("--steps", options.steps) if options.steps else ()))
    seconds_of["capture", ""] = done(world, "capture", options.model, store, *arguments)["seconds"]
    limit = ("--memory", options.memory) if options.memory else ()
    for accuracy in options.accuracy or ACCURACIES:
        out = folder / f"{accuracy}-{world}"
        result = done(world, "calibrate", store, out, "--accuracy", accuracy, "--overwrite", *limit)
        name = f"calibrate {accuracy}"
        seconds_of[name, ""], seconds_of[name, "sent"] = result["seconds"], result["sent"] / 2**20
        for stage, seconds in json.loads((out / "report.json").read_text())["seconds"].items():
            seconds_of[name, stage] = seconds
    return seconds_of


def gathering() -> None:
    """Gathers 64 MiB from each rank, as one of the ranks; rank 0 prints the MiB/s, with packing and unpacking."""
    ranks = ranks_of_environment()
    ranks.connect("cpu")
    mine = torch.rand(16 << 20)
    ranks.gather(mine)
    began = time.perf_counter()
    ranks.gather(mine)
    if ranks.rank == 0:
        print(64 * (ranks.world - 1) / (time.perf_counter() - began))
    ranks.close()


def rate(world: int) -> float:
    """Runs `gathering` with `world` processes; returns the MiB/s."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "bench.bench_ranks", "--gathering"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", action="append", choices=ACCURACIES)
    parser.add_argument("--memory", help="calibrate block by block, under this limit")
    parser.add_argument("--gathering", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gathering:
        return gathering()
    measurements: dict[int, dict[tuple[str, str], list[float]]] = {n: defaultdict(list) for n in (1, options.world)}
    with tempfile.TemporaryDirectory() as name:
        for round_index in range(options.rounds):
            for world, values in measurements.items():
                for key, value in measured(options, Path(name), world, round_index).items():
                    values[key].append(value)
    print(f"| command | stage | 1 process | {options.world} processes | speed-up |\n|---|---|---|---|---|")
    for (command, stage), values in measurements[1].items():
        one, several = statistics.median(values), statistics.median(measurements[options.world][command, stage])
        if stage == "sent":
            print(f"| {command} | sent by each | | {several:.2f} MiB | |")
        else:
            print(
                f"| {command} | {stage or 'all'} | {one:.2f} s | {several:.2f} s | {one / max(several, 1e-9):.2f} x |"
            )
    print(f"| a gather of 64 MiB from each | received by rank 0 | | {rate(options.world):.0f} MiB/s | |")


if __name__ == "__main__":
    main()
