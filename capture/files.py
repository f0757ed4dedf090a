"""Writes files and directories so that each exists whole, private and durable, or does not exist.

A file is made in a staging directory beside its target, written, given its mode whatever the umask, and synced before
it is renamed. A directory is filled as a staging directory and renamed. Every OSError becomes a StorageError.
"""

# This module needs descriptors, modes and O_NOFOLLOW, which pathlib does not offer.
# ruff: noqa: PTH101, PTH102, PTH104, PTH105, PTH108, PTH208
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UNSUPPORTED, StorageError, storage_error
from .sealed import digest_of, read_bytes, read_sealed, seal

__all__ = [
    "Modes",
    "SafeWriteUmask",
    "Sink",
    "clean",
    "commit_directory",
    "create",
    "fsync_directory",
    "make_directory",
    "read_bytes",
    "read_sealed",
    "remove",
    "replace_directory",
    "replace_file",
    "staging",
    "storage",
    "write_bytes",
    "write_sealed",
    "writing",
]

STAGING = re.compile(r"\.staging-([0-9a-f]{8})[0-9a-f]{8}")  # the group names the kernel of the process that made it
UNTOUCHED = 7 * 86400  # seconds without a write after which the process of a staging directory is taken for dead
RENAME_EXCHANGE = 2  # flag of Linux renameat2 (linux/fs.h)


@dataclass(frozen=True)
class Modes:
    """File modes: private, or readable for the group. Deployment tools refuse modes wider than 0640 and 0750."""

    group_readable: bool = False

    @property
    def data(self) -> int:
        return 0o440 if self.group_readable else 0o400

    @property
    def manifest(self) -> int:
        return 0o640 if self.group_readable else 0o600

    @property
    def directory(self) -> int:
        return 0o750 if self.group_readable else 0o700


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError about `path`; the OSError stays its __cause__."""
    try:
        yield
    except OSError as exc:
        raise storage_error(path, exc) from exc


class Sink:
    """A file being written, which torch.save accepts; `write` always writes the whole buffer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None  # kept because torch.save hides it behind a RuntimeError about positions

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        size = rest = view.nbytes
        try:
            while rest:
                rest -= os.write(self._descriptor, view[size - rest :])
        except OSError as exc:
            self.error = exc
            raise
        return size

    def flush(self) -> None:
        """Does nothing, for nothing is buffered."""


@contextmanager
def create(path: Path, mode: int) -> Iterator[Sink]:
    """Makes a file that must not exist yet, inside a staging directory: writes it, sets its mode, syncs it."""
    with storage(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    sink = Sink(descriptor)
    try:
        yield sink
        with storage(path):
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
    except Exception:
        if sink.error is not None:
            raise storage_error(path, sink.error) from sink.error
        raise
    finally:
        with storage(path):
            os.close(descriptor)


@contextmanager
def scratch(path: Path) -> Iterator[Sink]:
    """Makes a file that only this process reads during its own life: written without a sync."""
    with storage(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield Sink(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, mode: int) -> Iterator[Sink]:
    """Writes a file that replaces `path` in one step when the block ends well, and leaves no trace otherwise."""
    with staging(path.parent, path) as staged:
        with create(staged / path.name, mode) as sink:
            yield sink
        replace_file(staged / path.name, path)


def replace_file(staged: Path, target: Path) -> None:
    """Puts a file of a staging directory in the place of `target` in one step, durably."""
    with storage(target):
        os.replace(staged, target)
    fsync_directory(target.parent)


def write_bytes(path: Path, data: bytes | memoryview, mode: int) -> None:
    """Writes `data` to `path`, replacing any file there in one step."""
    with writing(path, mode) as sink:
        sink.write(data)


def write_sealed(path: Path, body: Any, mode: int) -> str:
    """Writes `body` sealed (see sealed.py), replacing any file at `path`; returns the digest of the file."""
    data = seal(body)
    write_bytes(path, data, mode)
    return digest_of(data)


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    with storage(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, durably; does nothing where there is none."""
    with storage(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
    fsync_directory(path.parent)


def make_directory(path: Path, mode: int) -> None:
    """Makes `path` and its missing parents, all with `mode` whatever the umask."""
    with storage(path):
        if not os.path.lexists(path.parent):
            make_directory(path.parent, mode)
        os.mkdir(path, 0o700)
        os.chmod(path, mode)
    fsync_directory(path.parent)


@contextmanager
def staging(parent: Path, shown: Path | None = None) -> Iterator[Path]:
    """Makes a directory in `parent` to fill and commit; removes whatever is left of it when the block ends.

    The directory is locked while this process lives: the lock tells it from a directory that a dead process left, and
    those in `parent` are removed first. Errors of the disk name `shown`, by default `parent`, and no staged file.
    """
    shown = shown or parent
    _clean_abandoned(parent)
    path = parent / f".staging-{_kernel()}{secrets.token_hex(4)}"
    held: list[int] = []
    try:
        with storage(shown):
            while not _make_staging(path, held):
                pass
        yield path
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and str(error).startswith(str(path)):
            raise storage_error(shown, error.__cause__) from error.__cause__
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for descriptor in held:
            with suppress(OSError):
                os.close(descriptor)


def _make_staging(path: Path, held: list[int]) -> bool:
    """Makes and locks a staging directory; False when another process removed it between mkdir and flock."""
    os.mkdir(path, 0o700)
    try:
        os.chmod(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    held.append(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.path.lexists(path)


@cache
def _kernel() -> str:
    """Eight hexadecimal digits for the running kernel: a lock is seen by the processes of one kernel."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()  # containers of a machine share it
    except OSError:
        identity = socket.gethostname().encode()
    return digest_of(identity)[:8]


def clean(directory: Path) -> None:
    """Removes the staging directories that no process has locked. The caller has to hold the lock of `directory`: it
    excludes processes of other machines, whose locks of directories cannot be seen."""
    with storage(directory):
        names = os.listdir(directory)
    for name in names:
        if STAGING.fullmatch(name):
            _remove_unlocked(directory / name)


def _clean_abandoned(directory: Path) -> None:
    """Removes the staging directories of dead processes, and leaves a directory whose process may live elsewhere."""
    with suppress(OSError):
        for name in os.listdir(directory):
            made = STAGING.fullmatch(name)
            if made and (made[1] == _kernel() or _of_no_other_machine(directory / name)):
                _remove_unlocked(directory / name)


def _of_no_other_machine(path: Path) -> bool:
    """Whether a staging directory of another kernel lies on this machine's disk, left by a restart, or is old."""
    try:
        if os.major(os.lstat(path).st_dev):  # a block device; networks, memory and overlays have the major number 0
            return True
        return time.time() - max(entry.lstat().st_mtime for entry in [path, *path.iterdir()]) > UNTOUCHED
    except OSError:
        return False


def _remove_unlocked(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def commit_directory(staged: Path, target: Path, mode: int = 0o700) -> None:
    """Renames a filled staging directory to `target`, durably. Raises StorageError when `target` exists."""
    with storage(target):
        os.chmod(staged, mode)
        fsync_directory(staged)
        if os.path.lexists(target):
            raise StorageError(f"{target}: exists already. Choose another name or remove it.")
        os.rename(staged, target)
    fsync_directory(target.parent)


def replace_directory(staged: Path, target: Path, mode: int = 0o700) -> None:
    """Puts a filled staging directory in the place of `target`: at every instant the old or the staged directory is
    there, never a mixture. A symbolic link is replaced itself. Where the system cannot exchange two names, there is an
    instant at which the old directory is only found as `.previous-NAME`; the next call puts it back. Raises
    StorageError when `target` is a file.
    """
    previous = target.with_name(f".previous-{target.name}"[:250])
    with storage(target):
        os.chmod(staged, mode)
        fsync_directory(staged)
        if os.path.lexists(previous) and not os.path.lexists(target):
            os.rename(previous, target)
        _discard(previous)
        if not os.path.lexists(target):
            os.rename(staged, target)
        elif not (target.is_dir() or target.is_symlink()):
            raise StorageError(f"{target}: exists and is not a directory.")
        elif not _exchange(staged, target):
            os.rename(target, previous)
            os.rename(staged, target)
    fsync_directory(target.parent)
    _discard(staged)
    _discard(previous)


def _discard(old: Path) -> None:
    if old.is_symlink():
        remove(old)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


class SafeWriteUmask:
    """Sets the umask while inside: files made there get at most mode 0400 (or what `umask` leaves); the old umask is
    always restored. The umask belongs to the process: one thread at a time is inside, and may enter again."""

    _one_thread = threading.RLock()

    def __init__(self, umask: int = 0o377) -> None:
        self._umask = umask
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._one_thread.acquire()
        self._before.append(os.umask(self._umask))

    def __exit__(self, *_: object) -> None:
        os.umask(self._before.pop())
        self._one_thread.release()
