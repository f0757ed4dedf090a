"""Locks a directory, so that only one process writes to it."""

# ruff: noqa: PTH108, PTH116
import fcntl
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from .errors import StorageError
from .files import storage

LOCK_NAME = ".lock"  # the file in a directory whose flock is the directory's lock


class Lock:
    """The lock of a directory. This process holds it until `release`; the system releases it when the process dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Releases the lock and removes its file; a second call does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.unlink(self._path)  # while locked: a process that has opened this file sees that it is gone, and retries
        except OSError:
            pass  # the file may stay: closing the descriptor releases the lock
        finally:
            with suppress(OSError):
                os.close(descriptor)


def lock(directory: Path) -> Lock:
    """Locks `directory` for this process, without waiting.

    Raises StorageError, naming the process that holds the lock, if the directory is locked already.
    """
    path = directory / LOCK_NAME
    with storage(directory):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            try:
                if _take(descriptor, path, directory):
                    return Lock(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _take(descriptor: int, path: Path, directory: Path) -> bool:
    """Locks the open lock file of `directory` and writes the id and the host of this process into it.

    `descriptor` is the file descriptor of the lock file, `path` the path. Returns False if the last process that held
    the lock has removed the file meanwhile. Raises StorageError if another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = re.fullmatch(r"(\d+) (\S+)\n", os.read(descriptor, 400).decode(errors="replace"))
        who = f"pid {holder[1]} on host {holder[2]}" if holder else "another process"
        raise StorageError(f"{directory}: in use by {who}. Wait until it ends, or use another directory.") from exc
    opened = os.fstat(descriptor)
    try:
        current = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if (opened.st_dev, opened.st_ino) != (current.st_dev, current.st_ino):
        return False
    os.fchmod(descriptor, 0o600)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    return True
