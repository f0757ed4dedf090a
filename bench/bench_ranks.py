"""Measures the speed-up by several ranks: seconds of capture and calibrate with one process and several, by stage.

python -m bench.bench_ranks [--model demo] [--prompts 8] [--world 2] [--rounds 3] [--memory 4GiB]

Every process has one thread. Runs of one and of several processes alternate; the table has the medians. Times include
loading the model and connecting, but not starting Python and importing torch.
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
    """The last JSON line of an octavo command that `world` processes run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "octavo", *map(str, arguments), "--json", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads([line for line in ran.stdout.splitlines() if line.startswith("{")][-1])


def measured(options: argparse.Namespace, folder: Path, world: int, at: int) -> dict[tuple[str, str], float]:
    """Seconds of one round by (command, stage); stage "" is the whole command, "sent" holds the MiB of rank 0."""
    found: dict[tuple[str, str], float] = {}
    store = folder / f"captured-{world}-{at}"
    arguments = ("--limit", options.prompts, *(("--steps", options.steps) if options.steps else ()))
    found["capture", ""] = done(world, "capture", options.model, store, *arguments)["seconds"]
    limit = ("--memory", options.memory) if options.memory else ()
    for accuracy in options.accuracy or ACCURACIES:
        out = folder / f"{accuracy}-{world}"
        said = done(world, "calibrate", store, out, "--accuracy", accuracy, "--overwrite", *limit)
        name = f"calibrate {accuracy}"
        found[name, ""], found[name, "sent"] = said["seconds"], said["sent"] / 2**20
        for stage, seconds in json.loads((out / "report.json").read_text())["seconds"].items():
            found[name, stage] = seconds
    return found


def gathering() -> None:
    """Prints, as one of several ranks, the MiB/s of a gather of 64 MiB from each rank, with packing and unpacking."""
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
    """The MiB/s that `gathering` prints."""
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
    found: dict[int, dict[tuple[str, str], list[float]]] = {n: defaultdict(list) for n in (1, options.world)}
    with tempfile.TemporaryDirectory() as name:
        for at in range(options.rounds):
            for world, values in found.items():
                for key, value in measured(options, Path(name), world, at).items():
                    values[key].append(value)
    print(f"| command | stage | 1 process | {options.world} processes | speed-up |\n|---|---|---|---|---|")
    for (command, stage), values in found[1].items():
        one, several = statistics.median(values), statistics.median(found[options.world][command, stage])
        if stage == "sent":
            print(f"| {command} | sent by each | | {several:.2f} MiB | |")
        else:
            print(
                f"| {command} | {stage or 'all'} | {one:.2f} s | {several:.2f} s | {one / max(several, 1e-9):.2f} x |"
            )
    print(f"| a gather of 64 MiB from each | arriving | | {rate(options.world):.0f} MiB/s | |")


if __name__ == "__main__":
    main()
