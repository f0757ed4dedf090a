"""Checks that a file is written whole or not at all, durably, with modes independent of the umask, and that errors are
one line."""

# ruff: noqa: PTH208
import errno
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from octavo.capture import files
from octavo.capture.errors import OctavoError
from octavo.capture.files import (
    Modes,
    OutputFile,
    SafeWriteUmask,
    clean,
    commit_directory,
    create,
    make_directory,
    read_bytes,
    read_sealed,
    replace_directory,
    staging,
    write_bytes,
    write_sealed,
    writing,
)
from octavo.capture.locks import lock

from ..helpers.faults import counting, dying, failing, fast_path, in_child
from ..helpers.refusals import refused

__all__ = ["fast_path"]

UMASKS = [0o000, 0o022, 0o077, 0o377, 0o777]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("group", [False, True])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int, group: bool) -> None:
    modes = Modes(group)
    make_directory(tmp_path / "a" / "b", modes.directory)
    write_bytes(tmp_path / "a" / "data", b"x", modes.data)
    write_sealed(tmp_path / "a" / "manifest", {}, modes.manifest)
    with staging(tmp_path) as staged:
        with create(staged / "data", modes.data) as sink:
            sink.write(b"y")
        commit_directory(staged, tmp_path / "c", modes.directory)
    expected = (0o750, 0o750, 0o440, 0o640, 0o750, 0o440) if group else (0o700, 0o700, 0o400, 0o600, 0o700, 0o400)
    names = ("a", "a/b", "a/data", "a/manifest", "c", "c/data")
    assert tuple(mode_of(tmp_path / name) for name in names) == expected


def test_a_file_of_mode_0400_is_replaced(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        write_bytes(tmp_path / "f", data, 0o400)
    assert (tmp_path / "f").read_bytes() == b"two"


def interrupted_after(sink: OutputFile) -> None:
    sink.write(b"half")
    raise KeyboardInterrupt


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "f", b"old", 0o600)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "f", 0o600) as sink:
        interrupted_after(sink)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_writing_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "f").symlink_to("precious")
    write_bytes(tmp_path / "f", b"mine", 0o600)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "f").is_symlink()


def test_everything_is_synced_before_its_name_appears(tmp_path: Path) -> None:
    with counting() as calls:
        write_bytes(tmp_path / "f", b"x", 0o400)
    written = ["open", "write", "fchmod", "fsync", "close", "replace", "open", "fsync", "close"]
    assert calls.names == ["listdir", "mkdir", "chmod", "open", *written, "close"]
    with staging(tmp_path) as staged, counting() as calls:
        commit_directory(staged, tmp_path / "d")
    assert calls.names == ["chmod", "open", "fsync", "close", "rename", "open", "fsync", "close"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, view: write(descriptor, view[:3]))
    write_bytes(tmp_path / "f", b"0123456789", 0o600)
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_commit_never_replaces_anything(tmp_path: Path) -> None:
    for target in ("empty", "full"):
        (tmp_path / target).mkdir()
    (tmp_path / "full" / "f").write_text("old")
    (tmp_path / "dangling").symlink_to("nowhere")

    def commit(target: str) -> None:
        with staging(tmp_path) as staged:
            commit_directory(staged, tmp_path / target)

    for target in ("empty", "full", "dangling"):
        refused(partial(commit, target), 5, "exists already")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "full"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_swaps_directories(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("one", "two", "three"):
        with staging(tmp_path) as staged:
            write_bytes(staged / "f", text.encode(), 0o400)
            replace_directory(staged, tmp_path / "out")
        assert (tmp_path / "out" / "f").read_text() == text
        assert os.listdir(tmp_path) == ["out"]


def test_replace_takes_the_place_of_a_link_and_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "file").write_text("x")

    def replace(target: str) -> None:
        with staging(tmp_path) as staged:
            replace_directory(staged, tmp_path / target)

    replace("link")
    refused(lambda: replace("file"), 5, "not a directory")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "precious"]
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_killed_anywhere_leaves_old_or_staged(
    fast_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def publish(text: str) -> None:
        with staging(fast_path) as staged:
            for name in ("weights", "description"):
                write_bytes(staged / name, text.encode(), 0o400)
            replace_directory(staged, fast_path / "out")

    publish("0")
    with counting() as calls:
        publish("1")
    for index in range(len(calls.names)):

        def killed(index: int = index) -> None:
            with counting(index, dying):
                publish("half")

        assert in_child(killed) == 9
        contents = {path.read_text() for path in (fast_path / "out").glob("*")}
        assert len(contents) == 1 or (not exchange and not contents)
        clean(fast_path)
        publish("1")
        assert {path.name for path in fast_path.iterdir()} == {"out"}


def staging_of_a_killed_process(directory: Path) -> Path:
    """Returns the staging directory of a process that was killed while it filled the directory."""

    def killed() -> None:
        with staging(directory) as staged:
            (staged / "f").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    (leftover,) = directory.glob(".staging-" + "[0-9a-f]" * 16)
    return leftover


def test_the_next_writer_removes_what_a_killed_process_left_and_spares_the_living(tmp_path: Path) -> None:
    (tmp_path / ".staging-notes").mkdir()
    (tmp_path / ".staging-notes" / "mine").touch()
    leftover = staging_of_a_killed_process(tmp_path)
    with staging(tmp_path) as mine:
        assert not leftover.exists()
        write_bytes(tmp_path / "f", b"x", 0o600)
        with staging(tmp_path) as other:
            assert {mine.name, other.name, "f", ".staging-notes"} == set(os.listdir(tmp_path))
    assert {"f", ".staging-notes"} == set(os.listdir(tmp_path))
    assert (tmp_path / ".staging-notes" / "mine").exists()


def test_a_staging_directory_whose_process_may_live_elsewhere_stays(fast_path: Path) -> None:
    """Another machine does not see the lock of a directory; the name of a staging directory says which kernel made
    it."""
    leftover = staging_of_a_killed_process(fast_path)
    elsewhere = leftover.rename(leftover.with_name(f".staging-{'0' * 8}{leftover.name[-8:]}"))
    write_bytes(fast_path / "f", b"x", 0o600)
    # only one machine uses a block device, whose major number is not 0
    assert elsewhere.exists() == (os.major(fast_path.stat().st_dev) == 0)
    elsewhere.mkdir(exist_ok=True)
    for path in (*elsewhere.iterdir(), elsewhere):
        os.utime(path, (0, time.time() - files.UNTOUCHED - 60))
    write_bytes(fast_path / "f", b"x", 0o600)
    assert os.listdir(fast_path) == ["f"]
    clean(fast_path)


def test_clean_removes_what_no_process_of_this_machine_has_locked(tmp_path: Path) -> None:
    leftover = staging_of_a_killed_process(tmp_path)
    leftover.rename(leftover.with_name(f".staging-{'0' * 16}"))
    with staging(tmp_path) as mine:
        clean(tmp_path)
        assert os.listdir(tmp_path) == [mine.name]


def test_errors_of_the_disk_name_what_the_user_gave(tmp_path: Path) -> None:
    def fill(index: int) -> None:
        with counting(index, failing(errno.ENOSPC)), staging(tmp_path, tmp_path / "out") as staged:
            make_directory(staged / "folder", 0o700)
            with create(staged / "folder" / "f", 0o400) as sink:
                sink.write(b"x")
            replace_directory(staged, tmp_path / "out")

    with counting() as calls:
        fill(10**6)
    assert (tmp_path / "out").is_dir()
    for index, name in enumerate(calls.names[:-3]):
        if name in ("mkdir", "open", "write", "fsync"):
            message = refused(partial(fill, index), 5, "no space left")
            assert message.startswith((f"{tmp_path / 'out'}: ", f"{tmp_path}: "))
    assert os.listdir(tmp_path) == ["out"]


def test_lock_names_its_holder_at_once_and_ends_with_it(tmp_path: Path) -> None:
    directory_lock = lock(tmp_path)
    message = refused(lambda: lock(tmp_path), 5)
    who = f"pid {os.getpid()} on host {os.uname().nodename}"
    assert message == f"{tmp_path}: in use by {who}. Wait until it ends, or use another directory."
    directory_lock.release()
    directory_lock.release()
    assert os.listdir(tmp_path) == []

    def killed() -> None:
        lock(tmp_path)
        os._exit(9)

    assert in_child(killed) == 9
    lock(tmp_path).release()


def test_only_one_thread_holds_the_lock(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def contend() -> None:
        for _ in range(50):
            try:
                directory_lock = lock(tmp_path)
            except OctavoError:
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            directory_lock.release()

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


ERRORS = {
    errno.ENOSPC: "no space left. Free space and run again.",
    errno.EDQUOT: "disk quota exceeded. Free space and run again.",
    errno.EROFS: "read-only file system. Use another directory.",
    errno.EACCES: f"permission denied for uid {os.geteuid()}. Change its permissions or use another path.",
    errno.ENAMETOOLONG: "name too long. Use a shorter one.",
    errno.EIO: "input/output error. Check the disk and run again.",
    errno.EINVAL: "the file system lacks rename, lock or sync (Invalid argument). Use another directory.",
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_failing_call_is_one_line_and_leaves_the_old_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "f"
    write_bytes(path, b"old", 0o600)
    # the calls that test_everything_is_synced_before_its_name_appears lists; the first and the last may fail
    for index in range(1, 13):
        with counting(index, failing(number)) as calls:
            message = refused(lambda: write_bytes(path, b"new", 0o600), 5)
        shown = path if index < 10 else tmp_path
        assert message == f"{shown}: {ERRORS[number]}"
        assert path.read_bytes() == (b"old" if "replace" not in calls.names[:index] else b"new")
        assert os.listdir(tmp_path) == ["f"]
        write_bytes(path, b"old", 0o600)


def test_sealed_json_comes_back_and_nothing_else_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    digest = write_sealed(path, {"b": ["é\u2028\x00"], "a": 0.1}, 0o600)
    assert read_sealed(path).body == {"b": ["é\u2028\x00"], "a": 0.1}
    assert read_sealed(path).digest == digest
    assert json.loads(path.read_text()).keys() == {"sha256", "body"}
    whole = path.read_bytes()
    for position in range(len(whole)):
        for damaged in (whole[:position], whole[:position] + b" " + whole[position:], _flip(whole, position)):
            path.write_bytes(damaged)
            refused(partial(read_sealed, path), 3, "damaged (checksum)")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_sealed(path, {"a": float("nan")}, 0o600)
    refused(lambda: write_sealed(path, {"a": ["file \udcff"]}, 0o600), 2, "cannot be written as UTF-8")


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


def test_only_regular_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    facts = {"link": "symbolic link", "fifo": "not a regular", "large": "larger than 64 MiB", "none": "missing"}
    for name, fact in {**facts, ".": "not a regular"}.items():
        refused(partial(read_bytes, tmp_path / name), 3, fact)


def test_safe_write_umask_is_reentrant_and_always_restored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    with pytest.raises(IsADirectoryError), SafeWriteUmask(), SafeWriteUmask(umask=0o077):
        (tmp_path / "inner").write_text("x") and tmp_path.write_text("x")
    assert mode_of(tmp_path / "inner") == 0o600
    with SafeWriteUmask():
        (tmp_path / "outer").write_text("x")
        with SafeWriteUmask(0):
            pass
        (tmp_path / "after").write_text("x")
    assert mode_of(tmp_path / "outer") == mode_of(tmp_path / "after") == 0o400
    assert os.umask(before) == before


def test_safe_write_umask_admits_one_thread_at_a_time(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with SafeWriteUmask(0o377 if number % 2 else 0o077):
                path = tmp_path / str(number)
                path.write_text("x")
                assert mode_of(path) == (0o400 if number % 2 else 0o600)
                path.unlink()

    failures: list[BaseException] = []

    def watched(number: int) -> None:
        try:
            write(number)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
