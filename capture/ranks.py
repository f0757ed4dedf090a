"""Connects the processes (ranks) that torchrun or `accelerate launch` started for one run, with torch.distributed.

Before each collective operation, all processes wait for each other with a counter in torch.distributed's key-value
store. A process that waits there still reacts to signals and to errors of other ranks, and notices within PATIENCE (60)
seconds that a rank has died. Inside a collective operation, a process would notice this only at the timeout.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from typing import Any, NamedTuple, TypeVar

from .errors import DeviceError, OctavoError, error_with

T = TypeVar("T")

BEAT = 2.0  # seconds between two heartbeats of a process
PATIENCE = 60.0  # seconds without a heartbeat after which a process counts as dead: 30 missed heartbeats
LINGER = 5.0  # most seconds that the process that hosts the store waits at the end for the others to disconnect
_TIMEOUT = timedelta(minutes=5)  # for the rendezvous, and for a collective operation after all processes have met
# backends of torch.distributed for tensors on each kind of device
_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


class Failure(NamedTuple):
    """The failure that ends the run: `rank` is the first rank that failed, `code` its exit code."""

    rank: int
    code: int


class Ranks:
    """The processes of a run. This base class is a run of one process, and does not import torch.

    `rank` is the number of this process, `world` the number of processes, `local` the number of this process on its
    machine, `sent` the bytes that this process has sent so far. Item i of a shared list belongs to rank i % world.
    `gather`, `first` and `wait` are collective: every rank must call them in the same order.
    """

    rank, world, local = 0, 1, 0

    def __init__(self) -> None:
        self.sent = 0
        self._counts: dict[str, int] = {}

    def connect(self, device: str) -> str:
        """Connects the processes; returns the name of the device that this process uses.

        `device` is auto, cpu, cuda or npu, with or without an index as in cuda:1. With several processes, auto becomes
        cuda where it is available, else cpu, and a missing index of cuda or npu becomes `local`, the number of this
        process on its machine. A single process uses `device` itself.
        """
        return device

    def owns(self, position: int) -> bool:
        """Returns whether this process works on item number `position` of a list that all ranks share."""
        return position % self.world == self.rank

    def share(self, items: list[T]) -> list[T]:
        """Returns this process's part of `items`: of n processes, each gets every n-th item of the same list."""
        return items[self.rank :: self.world]

    def gather(self, value: T) -> list[T]:
        """Returns a list of the `value` of every rank, in the order of the ranks. Tensors in these values are on this
        process's device.

        Raises DeviceError if a process has died. If a rank failed, raises an error with the exit code of that rank.
        """
        return [value]

    def first(self, value: T) -> T:
        """Returns the `value` of rank 0 on every rank.

        Raises DeviceError if a process has died. If a rank failed, raises an error with the exit code of that rank.
        """
        return value

    def wait(self) -> None:
        """Waits until all ranks have called `wait`.

        Raises DeviceError if a process has died. If a rank failed, raises an error with the exit code of that rank.
        """

    def count(self, name: str, by: int = 0) -> int:
        """Adds `by` to the counter `name`, which all ranks share, and returns the new value of the counter.

        Unlike the collective methods, one rank alone may call it, at any time. If another rank has failed, raises an
        error with the exit code of that rank.
        """
        self._counts[name] = self._counts.get(name, 0) + by
        return self._counts[name]

    def failed(self, code: int) -> Failure:
        """Announces to all ranks that this process failed with exit code `code`; returns the run's first failure."""
        return Failure(self.rank, code)

    def close(self) -> None:
        """Disconnects from the other processes."""


class ConnectedRanks(Ranks):
    """The processes of a run that has more than one. They find each other by the environment variables that torchrun
    sets.

    `rank` is the number of this process, `world` the number of processes, `local` the number of this process on its
    machine.
    """

    def __init__(self, rank: int, world: int, local: int) -> None:
        super().__init__()
        self.rank, self.world, self.local = rank, world, local
        self._store: Any = None
        self._device = "cpu"
        self._met = 0
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def connect(self, device: str) -> str:
        """Connects the processes; returns this process's device. Raises DeviceError if the others do not connect."""
        import torch.distributed as dist

        device, backend = _device_and_backend(device, self.local)
        self._device = "cpu" if backend == "gloo" else device
        try:
            store = next(iter(dist.rendezvous("env://", self.rank, self.world, timeout=_TIMEOUT)))[0]
        except Exception as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            fact = f"the processes did not find each other at {where} ({type(error).__name__})"
            raise DeviceError(f"{fact}. Start all processes with torchrun or accelerate launch.") from error
        self._store = dist.PrefixStore("octavo", store)
        self._heart.start()
        self._meet()
        with _connected():
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", store), rank=self.rank, world_size=self.world, timeout=_TIMEOUT
            )
        return device

    def gather(self, value: T) -> list[T]:
        packed = _packed(value)
        self.sent += len(packed) * (self.world - 1)
        self._meet()
        with _connected():
            parts = _gathered(packed, self.world)
        return [self._unpacked(part) for part in parts]

    def first(self, value: T) -> T:
        import torch.distributed as dist

        self._meet()
        packed = [_packed(value) if self.rank == 0 else b""]
        self.sent += len(packed[0]) * (self.world - 1)
        with _connected():
            dist.broadcast_object_list(packed, 0)
        return value if self.rank == 0 else self._unpacked(packed[0])

    def wait(self) -> None:
        self._meet()

    def count(self, name: str, by: int = 0) -> int:
        self._check()
        with _connected():
            return int(self._store.add(f"count/{name}", by))

    def failed(self, code: int) -> Failure:
        with suppress(Exception):  # without the store no other rank can announce anything
            announced = self._store.compare_set("failed", "", f"{self.rank} {code}")
            return Failure(*map(int, announced.split()))
        return Failure(self.rank, code)

    def close(self) -> None:
        if self._store is None:
            return
        import torch.distributed as dist

        self._ended.set()
        self._heart.join(BEAT)
        with suppress(Exception):
            departed, until = self._store.add("left", 1), time.monotonic() + LINGER
            hosting = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            while hosting and departed < self.world and time.monotonic() < until:
                time.sleep(0.02)
                departed = self._store.add("left", 0)
        with suppress(Exception):
            dist.destroy_process_group()

    def _beat(self) -> None:
        with suppress(Exception):
            while not self._ended.wait(BEAT):
                self._store.add(f"beat/{self.rank}", 1)

    def _meet(self) -> None:
        """Waits until every rank has called this method as many times as this rank. Raises an error if a rank has
        failed or died."""
        self._met += 1
        name, pause = f"met/{self._met}", 0.001
        beats, times = [-1] * self.world, [0.0] * self.world
        with _connected():
            arrived = int(self._store.add(name, 1))
        while arrived < self.world:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            self._check()
            self._check_heartbeats(beats, times)
            with _connected():
                arrived = int(self._store.add(name, 0))

    def _check(self) -> None:
        """Raises an error with the exit code of the first rank that has announced that it failed, if any."""
        with _connected():
            announced = self._store.get("failed") if self._store.check(["failed"]) else None
        if announced is not None:
            first = Failure(*map(int, announced.split()))
            raise error_with(first.code, f"rank {first.rank} failed and ended the run. Its message says why.")

    def _check_heartbeats(self, beats: list[int], times: list[float]) -> None:
        """Raises DeviceError for a rank without a heartbeat for PATIENCE (60) seconds.

        `beats` has the last count of heartbeats of each rank, `times` the time (time.monotonic) at which this process
        first read that count. The method updates both lists.
        """
        now = time.monotonic()
        for rank in range(self.world):
            if now < times[rank] + BEAT:
                continue
            with _connected():
                beat = int(self._store.add(f"beat/{rank}", 0))
            if beat != beats[rank]:
                beats[rank], times[rank] = beat, now
            elif now > times[rank] + PATIENCE:
                raise _lost_process(f"rank {rank}")

    def _unpacked(self, data: bytes) -> Any:
        import torch
        from torch.serialization import default_restore_location

        def place(storage: Any, location: str) -> Any:
            return default_restore_location(storage, "cpu" if location == "cpu" else self._device)

        # safe: the data come from other processes of the same run
        return torch.load(BytesIO(data), map_location=place, weights_only=False)


ALONE = Ranks()  # a run of one process


def ranks_of_environment() -> Ranks:
    """Returns the processes that the environment variables RANK, WORLD_SIZE and LOCAL_RANK describe.

    Returns a run of one process if the variables are missing or are not whole numbers.
    """
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return ConnectedRanks(rank, world, int(os.environ.get("LOCAL_RANK", rank))) if world > 1 else Ranks()
    except ValueError:
        return Ranks()


def _device_and_backend(device: str, local: int) -> tuple[str, str]:
    """Returns the device of process number `local` of a machine, and torch.distributed's backend for that device.

    `device` is the name that the user chose: it may be auto, and it may lack an index.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "npu":
        with suppress(ImportError):
            import torch_npu  # noqa: F401  # registers the backend hccl
    able = kind in _BACKENDS and hasattr(torch, kind) and getattr(torch, kind).is_available()
    if kind not in _BACKENDS:
        return device if device != "auto" else kind, "gloo"
    return f"{kind}:{index or local}", _BACKENDS[kind] if able else "gloo"


def _packed(value: Any) -> bytes:
    import torch

    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _gathered(data: bytes, world: int) -> list[bytes]:
    """Returns the `data` of each of the `world` ranks. torch's all_gather_object would make two more copies of it."""
    import torch
    import torch.distributed as dist

    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    mine = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    buffers = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(buffers, mine)
    return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]


def _lost_process(who: str) -> OctavoError:
    return DeviceError(f"{who} of this run has ended or lost its connection. Run again; add --resume for a capture.")


@contextmanager
def _connected() -> Iterator[None]:
    """Turns a RuntimeError in the `with` block, by which torch reports a dead process, into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        raise _lost_process("another process") from error
