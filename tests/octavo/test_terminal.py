"""How a process of ours ends when it is told to, told twice, or when others die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.capture.errors import OctavoError
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter
from octavo.terminal import Interrupted, interruptible

from ..helpers.commands import capture
from ..helpers.faults import counting, fast_path, in_child
from ..helpers.stores import MANIFEST, fill, holds, info_of

__all__ = ["fast_path"]

UNITS = 2


def session(directory: Path) -> None:
    with CaptureWriter.create(directory, MANIFEST | {"prompts": UNITS}, resume=True) as writer:
        fill(writer, range(UNITS))
        writer.complete()


def told_twice() -> None:
    """A fault: an interruption, and another before anything could be tidied."""
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)


def test_a_second_interruption_ends_at_once_wherever_the_store_is(fast_path: Path) -> None:
    with counting() as calls:
        session(fast_path / "whole")
    left = 0
    for at in range(len(calls.made)):
        store = fast_path / str(at)

        def interrupted(at: int = at, store: Path = store) -> None:
            with interruptible(), counting(at, told_twice):
                session(store)

        assert in_child(interrupted) == 130
        left += any(store.rglob(".staging-*"))
        before = {path: (path / "unit.json").read_bytes() for path in store.glob("units/0*")}
        session(store)
        assert holds(store, UNITS)
        assert before == {path: path.joinpath("unit.json").read_bytes() for path in before}
        assert not list(store.rglob(".*"))
    assert left  # it did not stay to tidy


def test_a_signal_that_a_launcher_passes_on_is_no_second_one() -> None:
    def interrupted() -> None:
        with pytest.raises(Interrupted), interruptible(launched=True):
            told_twice()

    assert in_child(interrupted) == 0


def test_a_worker_that_outlives_its_capture_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    gone, alive = os.pipe()

    def killed() -> None:
        writer = CaptureWriter.create(tmp_path, MANIFEST | {"prompts": UNITS})
        with writer.unit(0, info_of(0)):
            if os.fork() == 0:  # holds what the capture held until `theirs` is closed
                os.close(theirs)
                os.read(ours, 1)
                os.closerange(3, alive)
                os.closerange(alive + 1, 4096)
            os._exit(9)

    assert in_child(killed) == 9
    with pytest.raises(OctavoError, match="in use by pid ") as caught:
        session(tmp_path)
    assert caught.value.exit_code == 5
    os.close(theirs)
    os.close(alive)
    assert os.read(gone, 1) == b""
    os.close(ours)
    os.close(gone)
    session(tmp_path)
    assert holds(tmp_path, UNITS)
    assert not list(tmp_path.rglob(".*"))


BACKWARDS = """
import datetime, itertools, sys, time

asked, now = itertools.count(1), time.time
time.time = lambda: now() - 365 * 86400 - 3600 * next(asked)
time.time_ns = lambda: int(time.time() * 1e9)


class Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


datetime.datetime = Datetime
from octavo.cli import main

main(sys.argv[1:])
"""


def test_a_clock_that_goes_back_has_no_effect(tiny_model: Path, tmp_path: Path) -> None:
    """The clock is a year behind what was stored before and goes back an hour whenever it is asked."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring")

    def contents(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    capture(tiny_model, tmp_path / "a", prompts)
    capture(tiny_model, tmp_path / "b", prompts, "--limit", 1)
    for path in [tmp_path / "b", *(tmp_path / "b").rglob("*")]:
        os.utime(path, (2e9, 2e9))
    command = [sys.executable, "-c", BACKWARDS, "capture", tiny_model, tmp_path / "b", "--prompts", prompts, "--resume"]
    small = ["--steps", "3", "--height", "16", "--width", "16", "--device", "cpu"]
    done = subprocess.run([*map(str, command), *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    Capture.open(tmp_path / "b").verify()
