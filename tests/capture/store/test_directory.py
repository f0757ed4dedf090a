"""Checks which directories become a capture, and that all others are refused with the reason."""

# ruff: noqa: PTH208
import errno
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter, unit_key

from ...helpers.faults import counting, failing, in_child
from ...helpers.refusals import error_of, refused
from ...helpers.stores import MANIFEST, PLANNED, calls_of, files_of, fill, holds, info_of, make_store, refused_create


def test_an_absent_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    make_store(tmp_path / "a" / "b")
    assert holds(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    assert holds(make_store(tmp_path))


def test_an_existing_capture_is_not_overwritten(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, range(2))
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    expected = ": holds a capture (2 of 50 prompts). Use --resume or another directory."
    assert refused_create(tmp_path, 5) == expected
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before


def test_a_directory_of_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("theirs")
    for resume in (False, True):
        assert refused_create(tmp_path, 5, resume=resume) == (
            ": not empty and not a capture (found x). Use another directory."
        )
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert refused_create(tmp_path / "f", 5) == ": exists and is not a directory. Use another path."


def test_a_linked_directory_is_used_and_links_inside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with CaptureWriter.create(tmp_path / "link", MANIFEST) as writer:
        assert writer.directory == (tmp_path / "real").resolve()
        fill(writer, range(3))
        writer.complete()
    unit = next((tmp_path / "real" / "units").iterdir())
    unit.rename(tmp_path / "elsewhere")
    unit.symlink_to(tmp_path / "elsewhere")
    message = f"/units/{unit.name}: is a symbolic link inside the capture. "
    assert refused_create(tmp_path / "real", 3, MANIFEST, resume=True).startswith(message)
    refused(lambda: Capture.open(tmp_path / "real"), 3, "symbolic link inside the capture")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Yields a directory that other users can reach, which those of pytest's tmp_path are not."""
    path = Path(mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_of_another_user_is_refused(open_directory: Path, exists: bool) -> None:
    target = open_directory if exists else open_directory / "capture"

    def as_another_user() -> None:
        os.setuid(1000)
        assert refused_create(target, 5) == (
            ": permission denied for uid 1000. Change its permissions or use another path."
        )

    assert in_child(as_another_user) == 0
    assert os.listdir(open_directory) == []


def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "capture"
    with counting(0, failing(errno.EROFS)):
        assert refused_create(target, 5) == ": read-only file system. Use another directory."


def test_a_full_disk_tells_what_is_stored_and_resumes(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, range(4))
        with counting() as calls, writer.unit(4, info_of(4)) as unit:
            for one in calls_of(4):
                unit.add(one)
        index = calls.names.index("write")
    shutil.rmtree(tmp_path / "units" / f"000004-{unit_key(info_of(4))}")
    for number in (errno.ENOSPC, errno.EDQUOT):
        with CaptureWriter.create(tmp_path, PLANNED, resume=True) as writer:
            with counting(index, failing(number)):
                message = refused(partial(fill, writer, [4]), 5)
            assert message == (
                f"{tmp_path}: no space left (needs about 1 MiB more). 4 of 50 prompts are stored; "
                "free space and run again with --resume."
            )
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 5}, resume=True) as writer:
        fill(writer, range(5))
        writer.complete()
    assert holds(tmp_path, 5)


def test_a_disk_with_too_little_space_is_noticed_before_tensors_are_written(tmp_path: Path, monkeypatch: Any) -> None:
    with CaptureWriter.create(tmp_path / "whole", MANIFEST) as writer:
        fill(writer, range(1))
        needed = writer.stored_bytes
    for free, code in ((needed - 1, 5), (needed, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        with CaptureWriter.create(tmp_path / str(free), MANIFEST) as writer, counting() as calls:
            message = error_of(lambda: fill(writer, range(1)), 5)
            assert (message is None) == (code == 0)
        assert ("write" in calls.names) == (code == 0)
        if message is not None:
            assert message.startswith(f"{tmp_path / str(free)}: no space left (needs about 1 MiB more). 0 of ")


def test_a_real_limit_on_file_size_is_refused_and_resumes(tmp_path: Path) -> None:
    def limited() -> None:
        with CaptureWriter.create(tmp_path, MANIFEST) as writer:
            fill(writer, range(2))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            refused(lambda: fill(writer, [2]), 5, "file too large for this file system or limit")

    assert in_child(limited) == 0
    with CaptureWriter.create(tmp_path, MANIFEST, resume=True) as writer:
        assert sorted(writer.stored) == [0, 1]
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST):
        who = f"pid {os.getpid()} on host {os.uname().nodename}"
        expected = f": in use by {who}. Wait until it ends, or use another directory."
        assert refused_create(tmp_path, 5, MANIFEST, resume=True) == expected


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_sync_is_refused(tmp_path: Path, number: int) -> None:
    with counting() as calls, CaptureWriter.create(tmp_path / "probe", MANIFEST):
        pass
    with counting(calls.names.index("fsync"), failing(number)):
        assert "the file system lacks rename, lock or sync" in refused_create(tmp_path / "capture", 5)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o377])
@pytest.mark.parametrize("group", [False, True])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int, group: bool) -> None:
    before = os.umask(umask)
    try:
        store = make_store(tmp_path / "capture", 1, group_readable=group)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    directory, manifest, data = (0o750, 0o640, 0o440) if group else (0o700, 0o600, 0o400)
    for path in [store, *store.rglob("*")]:
        expected = directory if path.is_dir() else data if path.suffix == ".safetensors" else manifest
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("name", ["with space", "a+b", "采集", "x" * 255, "new\nline", "-dash", "'quote'"])
def test_unusual_names_are_used(tmp_path: Path, name: str) -> None:
    assert holds(make_store(tmp_path / name))


def test_names_too_long_are_refused(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 20, "e" * (4080 - 20 * 201 - len(str(tmp_path))))
    for path in (tmp_path / ("x" * 256), tmp_path.joinpath(*["d" * 200] * 25), deep):
        assert refused_create(path, 5) == ": name too long. Use a shorter one."
    assert os.listdir(tmp_path) == []
