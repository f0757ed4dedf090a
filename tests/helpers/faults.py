"""Faults at a chosen call of os: the call fails, or the process dies. And children to run such work in."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from octavo.capture import files, locks

PURE = ("fsencode", "strerror", "getpid", "geteuid")  # ask nothing of a disk


class CountingOs:
    """Stands in for `os` where files are written: lists its calls in `made`, and runs `fault` before call `at`."""

    def __init__(self, index: int | None = None, fault: Callable[[], None] = lambda: None) -> None:
        self.names: list[str] = []
        self._index, self._fault = index, fault

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(os, name)
        if not callable(attribute) or name in PURE or isinstance(attribute, type):
            return attribute

        def called(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 == self._index:
                self._fault()
            return attribute(*args, **kwargs)

        return called


@contextmanager
def counting(index: int | None = None, fault: Callable[[], None] = lambda: None) -> Iterator[CountingOs]:
    """Gives files.py and locks.py a CountingOs inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        counter = CountingOs(index, fault)
        patch.setattr(files, "os", counter)
        patch.setattr(locks, "os", counter)
        yield counter


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A directory in memory, where syncing costs nothing: its tests are about the order of the calls."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


def failing(number: int) -> Callable[[], None]:
    """A fault that raises the OSError of this errno."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def dying() -> None:
    """A fault that ends the process at once, as kill -9 does."""
    os._exit(9)


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process and returns its exit status: 0 when it returned, 1 when it raised, 130 when that
    was a KeyboardInterrupt, the code of a SystemExit, 9 when it died."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of a parallel region do not survive the fork
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
