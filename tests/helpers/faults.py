"""Faults at a chosen call of os, where the call fails or the process dies, and child processes to run such work in."""

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

PURE = ("fsencode", "strerror", "getpid", "geteuid")  # these do not access a disk


class CountingOs:
    """Replaces `os` in the modules that write files. It lists the calls by name in `names` and runs `fault` before call
    number `index`."""

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
    """Replaces `os` in files.py and locks.py by a CountingOs inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        counter = CountingOs(index, fault)
        patch.setattr(files, "os", counter)
        patch.setattr(locks, "os", counter)
        yield counter


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """Yields a directory in memory, where syncing is fast, for tests of the order of calls."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


def failing(number: int) -> Callable[[], None]:
    """Returns a fault that raises the OSError of this errno."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def dying() -> None:
    """Ends the process at once, as kill -9 does. This function is a fault."""
    os._exit(9)


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process and returns its exit status.

    The status is 0 if `work` returned, 130 for a KeyboardInterrupt, the code of a SystemExit, 1 for any other
    exception, and 9 if the process died by `dying`. A process killed by a signal has the negative number of the signal.
    """
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
