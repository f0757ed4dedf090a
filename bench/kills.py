"""Kills every writer with SIGKILL at many points, runs it again on the same path, and counts the leftovers.

    python -m bench.kills            # 26 points for each writer
    python -m bench.kills --points 0 # a kill before every call of the system

A point is a call of `os` in the modules that write and lock (capture/files.py, capture/locks.py). Prints for each
writer the number of points, of kills, and of kills that left a temporary name; the temporary names that remained after
the next run (should be 0); and how often the content after a kill was the old one, the new one, or neither (should be
0).
"""

import argparse
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from octavo.calibrate import Calibrator, QuantConfig
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import export
from octavo.calibrate.settings import Settings
from octavo.capture.files import write_bytes
from octavo.capture.store.writer import CaptureWriter
from tests.helpers.faults import counting, in_child
from tests.helpers.stores import MANIFEST, fill
from tests.zoo.hard_sd3 import hard, prompts
from tests.zoo.toy import calls, toy

Write = Callable[[Path, bool], None]  # writes to a path; True selects the second of two contents


class Writer(NamedTuple):
    """A function that writes to `name` in a folder. With `gap`, the target may be unreadable after a kill."""

    name: str
    write: Write
    gap: bool = False


def content(path: Path) -> dict[str, bytes]:
    """Reads the files at and below a path, except for temporary ones, whose names begin with a dot."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if "/." not in str(file)}


def checkpoints(formats: tuple[str, ...]) -> Write:
    """Makes a function that exports an SD3 transformer in these formats."""
    model = hard()
    results = [calibrate(model, lambda: prompts(3, 2), Settings(symmetric=symmetric)) for symmetric in (False, True)]

    def write(path: Path, second: bool) -> None:
        export(results[second], model, path, formats, overwrite=True)

    return write


def documented() -> Write:
    """Makes a function that writes with `Calibrator.export_quant_safetensor` beside a file of the user."""
    calibrators = [
        Calibrator(
            toy(), QuantConfig(a_sym=symmetric, quant_mode=1), [call.kwargs | {"x": call.args[0]} for call in calls()]
        )
        for symmetric in (False, True)
    ]
    for calibrator in calibrators:
        calibrator.run()

    def write(path: Path, second: bool) -> None:
        path.mkdir(exist_ok=True)
        (path / "readme.txt").touch()
        calibrators[second].export_quant_safetensor(path)

    return write


def captures(path: Path, second: bool) -> None:
    """Writes a capture of three prompts, or continues an interrupted one."""
    with CaptureWriter.create(path, MANIFEST, resume=True) as writer:
        fill(writer, range(3))
        writer.complete()


def pages(path: Path, second: bool) -> None:
    """Writes a single file."""
    write_bytes(path, b"second" if second else b"first", 0o600)


@contextmanager
def place() -> Iterator[Path]:
    """Makes a temporary folder, if possible in memory, where syncing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def kill() -> None:
    """Ends this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def measure(title: str, writer: Writer, wanted: int) -> int:
    """Prints the line of one writer; returns the number of remaining names and of contents neither old nor new."""
    kills, messes, leftovers, outcomes = 0, 0, 0, Counter[str]()
    with place() as folder:
        target = folder / writer.name
        writer.write(folder / "reference", True)
        new = content(folder / "reference")
        writer.write(target, False)
        with counting() as counter:
            writer.write(target, False)
        old, total = content(target), len(counter.names)
        for call in sorted(
            {round(index * (total - 1) / max(1, (wanted or total) - 1)) for index in range(wanted or total)}
        ):
            status = in_child(partial(killed, writer, target, call))
            kills += status == -signal.SIGKILL
            current = content(target) if target.exists() else {}
            messes += any(".staging-" in str(path) or path.name == ".lock" for path in folder.rglob(".*"))
            outcomes["old" if current == old else "new" if current == new else "gap" if writer.gap else "neither"] += 1
            writer.write(target, False)
            leftovers += sum(1 for _ in folder.rglob(".*"))
    states = ", ".join(f"{count} {state}" for state, count in sorted(outcomes.items()))
    print(
        f"{title:<28} {total:>4} calls  {kills:>4} kills  {messes:>4} with leftovers  {leftovers} remain  {states}",
        flush=True,
    )
    return leftovers + outcomes["neither"]


def killed(writer: Writer, target: Path, call: int) -> None:
    """Writes the second content, and kills this process before call number `call` of `os`."""
    with counting(call, kill):
        writer.write(target, True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--points", type=int, default=26, help="number of kills of each writer; 0 kills before every call"
    )
    points = parser.parse_args().points
    writers = {
        "export ascend": Writer("out", checkpoints(("ascend",))),
        "export diffusers": Writer("out", checkpoints(("diffusers",))),
        "export torchao": Writer("out", checkpoints(("torchao",))),
        "export of three formats": Writer("out", checkpoints(("ascend", "diffusers", "torchao"))),
        "export_quant_safetensor": Writer("out", documented(), gap=True),
        "one file": Writer("page.html", pages),
    }
    bad = sum(measure(title, writer, points) for title, writer in writers.items())
    bad += measure_capture(points)
    print(f"{bad} leftovers or contents that are neither old nor new")


def measure_capture(wanted: int) -> int:
    """Prints the line of the writer of captures, which continues after a kill; returns the number of faults."""
    with counting() as counter, place() as folder:
        captures(folder / "capture", False)
        whole = content(folder / "capture")
    total, leftovers, wrong, kills, messes = len(counter.names), 0, 0, 0, 0
    for call in sorted(
        {round(index * (total - 1) / max(1, (wanted or total) - 1)) for index in range(wanted or total)}
    ):
        with place() as folder:
            kills += in_child(partial(killed, Writer("capture", captures), folder / "capture", call)) == -signal.SIGKILL
            messes += any(folder.rglob(".*"))
            captures(folder / "capture", False)
            leftovers += sum(1 for _ in folder.rglob(".*"))
            wrong += content(folder / "capture") != whole
    line = (
        f"{kills:>4} kills  {messes:>4} with leftovers  {leftovers} remain  {kills - wrong} resumed to the same bytes"
    )
    print(f"{'capture':<28} {total:>4} calls  {line}", flush=True)
    return leftovers + wrong


if __name__ == "__main__":
    main()
