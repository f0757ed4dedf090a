"""Writes files and directories atomically: after a crash each is either complete and on disk, or not there at all.

A file is written in a staging directory beside its target, gets its mode regardless of the umask, and is synced
before it is renamed. A directory is filled as a staging directory and then renamed. Every OSError is raised as a
StorageError.
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
    "OutputFile",
    "SafeWriteUmask",
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

# the name of a staging directory, which is renamed when its content is complete; the group identifies the running
# kernel of the machine that made the directory
STAGING = re.compile(r"\.staging-([0-9a-f]{8})[0-9a-f]{8}")
# seconds without a write after which a staging directory counts as abandoned: a week, far longer than writing takes
UNTOUCHED = 7 * 86400
RENAME_EXCHANGE = 2  # flag of Linux renameat2 (linux/fs.h)


@dataclass(frozen=True)
class Modes:
    """Holds the file modes of Octavo's files: readable for the user only, or for the group too.

    Deployment tools refuse files with modes wider than 0640 and directories wider than 0750.
    """

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
    """Raises StorageError about `path` in place of an OSError in the `with` block; the OSError is its __cause__."""
    try:
        yield
    except OSError as exc:
        raise storage_error(path, exc) from exc


class OutputFile:
    """An open file to which torch.save can write. `write` writes the whole buffer, which os.write need not do."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None  # torch.save replaces it by a RuntimeError about file positions

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
        """Does nothing, because nothing is buffered."""


@contextmanager
def create(path: Path, mode: int) -> Iterator[OutputFile]:
    """Creates the file `path` and yields it for the `with` block to write. The caller chooses a `path` in a temporary
    (staging) directory, so that no other process reads an incomplete file.

    When the block ends, sets the file's mode to `mode` and syncs the file to disk. Raises StorageError if the file
    exists, or if it cannot be written.
    """
    with storage(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    sink = OutputFile(descriptor)
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
def scratch(path: Path) -> Iterator[OutputFile]:
    """Creates the temporary file `path` and yields it for the `with` block to write.

    Does not sync the file to disk, because only this process reads it.
    """
    with storage(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield OutputFile(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, mode: int) -> Iterator[OutputFile]:
    """Yields a new file for the `with` block to write, and replaces `path` by it in one step when the block ends.

    The file gets the mode `mode`. If the block raises an error, `path` is unchanged.
    """
    with staging(path.parent, path) as staged:
        with create(staged / path.name, mode) as sink:
            yield sink
        replace_file(staged / path.name, path)


def replace_file(staged: Path, target: Path) -> None:
    """Replaces the file `target` by `staged`, a file in a temporary (staging) directory, in one step.

    Then syncs the directory of `target`.
    """
    with storage(target):
        os.replace(staged, target)
    fsync_directory(target.parent)


def write_bytes(path: Path, data: bytes | memoryview, mode: int) -> None:
    """Writes `data` to `path` with the file mode `mode`, replacing any file there in one step."""
    with writing(path, mode) as sink:
        sink.write(data)


def write_sealed(path: Path, body: Any, mode: int) -> str:
    """Writes `body` and its SHA-256 as JSON, with the file mode `mode`, replacing any file at `path`; returns the
    SHA-256 of the whole file."""
    data = seal(body)
    write_bytes(path, data, mode)
    return digest_of(data)


def fsync_directory(path: Path) -> None:
    """Syncs a directory: makes files created, renamed or removed in it survive a crash."""
    with storage(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file and syncs its directory; does nothing if the file does not exist."""
    with storage(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
    fsync_directory(path.parent)


def make_directory(path: Path, mode: int) -> None:
    """Makes the directory `path` and its missing parents, all with `mode` regardless of the umask."""
    with storage(path):
        if not os.path.lexists(path.parent):
            make_directory(path.parent, mode)
        os.mkdir(path, 0o700)
        os.chmod(path, mode)
    fsync_directory(path.parent)


@contextmanager
def staging(parent: Path, shown: Path | None = None) -> Iterator[Path]:
    """Makes a temporary (staging) directory in `parent` and yields its path; the `with` block fills and renames it.

    When the block ends, removes what remains of the directory. The directory is locked until then, or until this
    process dies. First removes the unlocked staging directories that dead processes have left in `parent`. `shown` is
    the path in messages about errors of the disk, by default `parent`, because users do not know the staging directory.
    """
    shown = shown or parent
    _clean_abandoned(parent)
    path = parent / f".staging-{_kernel()}{secrets.token_hex(4)}"
    descriptors: list[int] = []
    try:
        with storage(shown):
            while not _make_staging(path, descriptors):
                pass
        yield path
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and str(error).startswith(str(path)):
            raise storage_error(shown, error.__cause__) from error.__cause__
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)


def _make_staging(path: Path, descriptors: list[int]) -> bool:
    """Makes and locks a staging directory, and appends its open descriptor to `descriptors`. Returns False if another
    process removed the directory between mkdir and flock."""
    os.mkdir(path, 0o700)
    try:
        os.chmod(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    descriptors.append(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.path.lexists(path)


@cache
def _kernel() -> str:
    """Returns eight hexadecimal digits that identify the running kernel. They are in the names of staging directories,
    because only processes of one kernel see each other's locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()  # containers of a machine share it
    except OSError:
        identity = socket.gethostname().encode()
    return digest_of(identity)[:8]


def clean(directory: Path) -> None:
    """Removes the temporary (staging) directories in `directory` that no process has locked.

    The caller has to hold the lock of `directory` itself (locks.py), which excludes processes of other machines. The
    locks of such processes on staging directories are not visible here.
    """
    with storage(directory):
        names = os.listdir(directory)
    for name in names:
        if STAGING.fullmatch(name):
            _remove_unlocked(directory / name)


def _clean_abandoned(directory: Path) -> None:
    """Removes the staging directories of processes that have ended. Keeps a staging directory if the process that made
    it may be running on another machine."""
    with suppress(OSError):
        for name in os.listdir(directory):
            matched = STAGING.fullmatch(name)
            if matched and (matched[1] == _kernel() or _is_removable(directory / name)):
                _remove_unlocked(directory / name)


def _is_removable(path: Path) -> bool:
    """Returns whether the staging directory `path` may be removed, because the process that made it has surely or
    probably ended: if it is on a local disk, to which no other machine writes, or if nothing was written to it for
    seven days (UNTOUCHED). Only for a directory that was made on another machine, or on this machine before its last
    reboot."""
    try:
        if os.major(os.lstat(path).st_dev):  # a block device; network, memory and overlay file systems have major 0
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
    """Renames the filled temporary directory `staged` to `target`, with the mode `mode`, and syncs it to disk.

    Raises StorageError if `target` exists.
    """
    with storage(target):
        os.chmod(staged, mode)
        fsync_directory(staged)
        if os.path.lexists(target):
            raise StorageError(f"{target}: exists already. Choose another name or remove it.")
        os.rename(staged, target)
    fsync_directory(target.parent)


def replace_directory(staged: Path, target: Path, mode: int = 0o700) -> None:
    """Replaces `target` by the filled temporary directory `staged`, in one step where Linux can exchange two names.

    Elsewhere the old directory is first renamed to `.previous-NAME`; if the process dies before the new directory
    has its name, the next call renames the old one back. If `target` is a symbolic link, the link is replaced, not
    the directory that it points to. The directory gets the mode `mode`. Raises StorageError if `target` is a file.
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
            raise StorageError(f"{target}: exists and is not a directory. Use another path.")
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
    """Exchanges the names of two files or directories in one step, by Linux's renameat2.

    Returns False if the kernel or the file system lacks renameat2. Raises OSError for any other failure.
    """
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
    """Sets the umask of the process while its `with` block runs, and restores the old one afterwards.

    With the default `umask` files created in the block get at most mode 0400. Because the umask belongs to the whole
    process, only one thread at a time can be in such a block; the same thread may nest blocks.
    """

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
