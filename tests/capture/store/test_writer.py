"""Checks that an interrupted capture can be resumed after any fault, and is then the same as an uninterrupted one."""

# ruff: noqa: PTH208
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from octavo.capture.errors import OctavoError
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter, UnitWriter, unit_key

from ...helpers.examples import some_of
from ...helpers.faults import counting, dying, failing, fast_path, in_child
from ...helpers.refusals import enter_and_leave, refused
from ...helpers.stores import MANIFEST, calls_of, fill, holds, info_of, make_store, refused_create

__all__ = ["fast_path"]


def failing_after(unit: UnitWriter, error: type[BaseException]) -> None:
    unit.add(calls_of(0)[0])
    raise error


def test_a_unit_is_dropped_when_its_block_raises(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST) as writer:
        for error in (KeyboardInterrupt, RuntimeError, SystemExit):
            with pytest.raises(error), writer.unit(0, info_of(0)) as unit:
                failing_after(unit, error)
            assert (writer.stored, os.listdir(tmp_path / "units")) == ({}, [])
        refused(lambda: enter_and_leave(writer.unit(0, info_of(0))), 4, "has no calls")
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_resume_goes_on_and_an_index_is_used_once(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST) as writer:
        fill(writer, [1])
        writer.complete()
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 4}, resume=True) as writer:
        assert writer.stored == {1: unit_key(info_of(1))}
        refused(lambda: enter_and_leave(writer.unit(1, {})), 4, "unit 1 is already stored")
        assert (tmp_path / "complete.json").exists()
        fill(writer, [0])
        assert not (tmp_path / "complete.json").exists()
        fill(writer, range(4))
        writer.complete()
    assert holds(tmp_path, 4)
    assert Capture.open(tmp_path).manifest["prompts"] == 4


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"settings": {"steps": 4, "seed": 0}}, "settings.steps 2, now 4"),
        ({"settings": {"steps": 2}}, "settings.seed 0, now None"),
        ({"pipeline": "FluxPipeline"}, "pipeline StableDiffusion3Pipeline, now FluxPipeline"),
        ({"extra": True}, "extra None, now True"),
    ],
)
def test_resume_with_other_settings_names_the_first(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    make_store(tmp_path)
    expected = f": captured with {fact}. Use the same settings or another directory."
    assert refused_create(tmp_path, 4, MANIFEST | change, resume=True) == expected


def test_resume_refuses_a_damaged_unit_until_it_is_deleted(tmp_path: Path) -> None:
    make_store(tmp_path)
    data = sorted(tmp_path.rglob("*.safetensors"))[1]
    data.chmod(0o600)
    data.write_bytes(data.read_bytes()[:-1])
    message = refused_create(tmp_path, 3, MANIFEST, resume=True)
    assert message.endswith(f"Delete {data.parent} and run capture --resume.")
    shutil.rmtree(data.parent)
    with CaptureWriter.create(tmp_path, MANIFEST, resume=True) as writer:
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_the_same_calls_give_the_same_digests(tmp_path: Path) -> None:
    def digests(name: str) -> list[str]:
        return [unit.digest for unit in Capture.open(tmp_path / name).units]

    make_store(tmp_path / "once")
    with CaptureWriter.create(tmp_path / "resumed", MANIFEST) as writer:
        fill(writer, [2, 0])
    with CaptureWriter.create(tmp_path / "resumed", MANIFEST, resume=True, group_readable=True) as writer:
        fill(writer, range(3))
        writer.complete()
    assert digests("once") == digests("resumed")
    for name in ("000000", "000002"):
        files = [next((tmp_path / run / "units").glob(f"{name}-*")) for run in ("once", "resumed")]
        assert (files[0] / "unit.json").read_bytes() == (files[1] / "unit.json").read_bytes()


# Faults at every call of os

FEW = 2


def session(directory: Path) -> None:
    """Captures FEW prompts, and continues a capture that exists."""
    with CaptureWriter.create(directory, MANIFEST | {"prompts": FEW}, resume=True) as writer:
        fill(writer, range(FEW))
        writer.complete()


def committed(directory: Path) -> dict[str, bytes]:
    units = directory / "units"
    return {path.name: (path / "unit.json").read_bytes() for path in units.glob("0*")} if units.exists() else {}


def check_after_fault(directory: Path, index: int) -> None:
    """Checks that committed units are whole, and that a second session writes the rest and leaves no temporary
    files."""
    before = committed(directory)
    session(directory)
    assert holds(directory, FEW), index
    assert before.items() <= committed(directory).items(), index
    leftovers = [path.name for path in directory.rglob(".*")]
    assert not leftovers, (index, leftovers)
    shutil.rmtree(directory)


def sites(directory: Path) -> int:
    with counting() as calls:
        session(directory)
    return len(calls.names)


def refusal(directory: Path) -> OctavoError | None:
    """Returns the OctavoError that a session ends with. None if it succeeds, as it may when only tidying failed."""
    try:
        session(directory)
    except OctavoError as exc:
        return exc
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_any_failing_call_is_a_storage_error_and_resumable(fast_path: Path, number: int) -> None:
    refusals = 0
    for index in range(sites(fast_path / "whole")):
        with counting(index, failing(number)):
            error = refusal(fast_path / "capture")
        if error is not None:
            refusals += 1
            assert (error.exit_code, str(error).count("\n")) == (5, 0)
        check_after_fault(fast_path / "capture", index)
    assert refusals > index * 0.7


def test_killed_at_any_call_it_is_resumable(fast_path: Path) -> None:
    for index in some_of(sites(fast_path / "whole")):

        def killed(index: int = index) -> None:
            with counting(index, dying):
                session(fast_path / "capture")

        assert in_child(killed) == 9
        check_after_fault(fast_path / "capture", index)


def test_interrupted_at_any_call_a_unit_is_whole_or_absent(fast_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    for index in some_of(sites(fast_path / "whole")):

        def interrupted(index: int = index) -> None:
            with counting(index, interrupt):
                session(fast_path / "capture")

        assert in_child(interrupted) == 130
        check_after_fault(fast_path / "capture", index)
