"""Locks a directory for one process."""

# ruff: noqa: PTH108, PTH116
import fcntl
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from .errors import StorageError
from .files import storage

LOCK_NAME = ".lock"


class Lock:
    """The lock of a directory, held by this process until `release`; a killed process holds none."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Releases the directory; a second call does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.unlink(self._path)  # while locked: a process that opened the file before finds another one and retries
        except OSError:
            pass  # the file may stay: the lock is on the descriptor
        finally:
            with suppress(OSError):
                os.close(descriptor)


def lock(directory: Path) -> Lock:
    """Locks `directory` for this process, or raises StorageError at once, naming the process that holds the lock."""
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
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = re.fullmatch(r"(\d+) (\S+)\n", os.read(descriptor, 400).decode(errors="replace"))
        who = f"pid {holder[1]} on host {holder[2]}" if holder else "another process"
        raise StorageError(f"{directory}: in use by {who}.") from exc
    held = os.fstat(descriptor)
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
        return False
    os.fchmod(descriptor, 0o600)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    return True
