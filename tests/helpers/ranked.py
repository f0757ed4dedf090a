"""Runs of several ranks: real processes, forked from the test process and connected by gloo."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from octavo.cli import main


class RankResult(NamedTuple):
    """Result of one rank: its exit code (negative: the signal that killed it) and its output."""

    code: int
    output: str


class RunningRanks:
    """The ranks of a run while they run. `pids` lists their processes, `files` their outputs, both in order of rank."""

    def __init__(self, world: int, folder: Path, work: Callable[[int], Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"said-{rank}" for rank in range(world)]
        self.pids = [self._fork(rank, world, port, work) for rank in range(world)]

    def _fork(self, rank: int, world: int, port: int, work: Callable[[int], Any]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            descriptor = os.open(self.files[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)  # the threads of a parallel region do not survive the fork
            work(rank)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def end(self) -> list[RankResult]:
        """Waits for all ranks and returns their results."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        return [RankResult(code, file.read_text()) for code, file in zip(codes, self.files, strict=True)]


def printing(*arguments: object) -> None:
    """Runs a command in this process and flushes its output, because a child starts with the parent's buffers."""
    import sys

    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        main([str(argument) for argument in arguments])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def ranked(
    world: int, folder: Path, *arguments: object, before: Callable[[int], Any] = lambda rank: None
) -> list[RankResult]:
    """Runs an octavo command as `world` ranks. Each rank calls `before(rank)` first."""

    def work(rank: int) -> None:
        before(rank)
        printing(*arguments)

    return RunningRanks(world, folder, work).end()
