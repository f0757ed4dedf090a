"""Ranks: processes that share a run, started by torchrun or `accelerate launch`, connected by torch.distributed alone.

Before a collective the processes meet in the store of the rendezvous. A process that waits there still reacts to
signals, to errors of other ranks, and to the silence of a dead one; a collective would notice only at its timeout.
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

BEAT = 2.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without a sign of life after which a process is taken for dead
LINGER = 5.0  # most seconds that the process with the store stays for others to read it
_TIMEOUT = timedelta(minutes=5)  # for the rendezvous, and for a collective after all processes have met
_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


class Failure(NamedTuple):
    """The rank that ended the run, and its exit code."""

    rank: int
    code: int


class Ranks:
    """The processes of a run. This class is a run of one process, and needs no torch.

    Position i of any shared list belongs to rank i % world. `local` is this process's number on its machine. `gather`,
    `first` and `wait` are collective: every rank calls them in the same order. `sent`: bytes sent so far.
    """

    rank, world, local = 0, 1, 0

    def __init__(self) -> None:
        self.sent = 0
        self._counts: dict[str, int] = {}

    def connect(self, device: str) -> str:
        """Connects the processes; returns the device of this process, filling in what `device` (auto, cuda, ...) leaves
        open."""
        return device

    def owns(self, position: int) -> bool:
        """Whether the item at this position belongs to this process."""
        return position % self.world == self.rank

    def share(self, items: list[T]) -> list[T]:
        """The items that belong to this process."""
        return items[self.rank :: self.world]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks; tensors arrive on this process's device.

        Raises DeviceError when a process is gone, and the error with the exit code of a rank that failed.
        """
        return [value]

    def first(self, value: T) -> T:
        """The value of rank 0. Raises as `gather` does."""
        return value

    def wait(self) -> None:
        """Returns when all ranks have called this. Raises as `gather` does."""

    def count(self, name: str, by: int = 0) -> int:
        """Adds to a counter that all ranks share, and returns its value; not collective. Raises as `gather` does."""
        self._counts[name] = self._counts.get(name, 0) + by
        return self._counts[name]

    def failed(self, code: int) -> Failure:
        """Announces that this process ends with this exit code; returns the first such announcement of any rank."""
        return Failure(self.rank, code)

    def close(self) -> None:
        """Disconnects from the other processes."""


class Group(Ranks):
    """A run of several processes, described by the environment variables of torchrun."""

    def __init__(self, rank: int, world: int, local: int) -> None:
        super().__init__()
        self.rank, self.world, self.local = rank, world, local
        self._store: Any = None
        self._device = "cpu"
        self._met = 0
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def connect(self, device: str) -> str:
        """Connects the processes. Raises DeviceError when the others do not come to the rendezvous."""
        import torch.distributed as dist

        device, backend = _placed(device, self.local)
        self._device = "cpu" if backend == "gloo" else device
        try:
            found = next(iter(dist.rendezvous("env://", self.rank, self.world, timeout=_TIMEOUT)))[0]
        except Exception as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            fact = f"no rendezvous at {where} ({type(error).__name__})"
            raise DeviceError(f"{fact}. Start all processes with torchrun or accelerate launch.") from error
        self._store = dist.PrefixStore("octavo", found)
        self._heart.start()
        self._meet()
        with _connected():
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", found), rank=self.rank, world_size=self.world, timeout=_TIMEOUT
            )
        return device

    def gather(self, value: T) -> list[T]:
        packed = _packed(value)
        self.sent += len(packed) * (self.world - 1)
        self._meet()
        with _connected():
            found = _gathered(packed, self.world)
        return [self._unpacked(each) for each in found]

    def first(self, value: T) -> T:
        import torch.distributed as dist

        self._meet()
        found = [_packed(value) if self.rank == 0 else b""]
        self.sent += len(found[0]) * (self.world - 1)
        with _connected():
            dist.broadcast_object_list(found, 0)
        return value if self.rank == 0 else self._unpacked(found[0])

    def wait(self) -> None:
        self._meet()

    def count(self, name: str, by: int = 0) -> int:
        self._check()
        with _connected():
            return int(self._store.add(f"count/{name}", by))

    def failed(self, code: int) -> Failure:
        with suppress(Exception):  # without the store no other rank can announce anything
            said = self._store.compare_set("failed", "", f"{self.rank} {code}")
            return Failure(*map(int, said.split()))
        return Failure(self.rank, code)

    def close(self) -> None:
        if self._store is None:
            return
        import torch.distributed as dist

        self._ended.set()
        self._heart.join(BEAT)
        with suppress(Exception):
            left, until = self._store.add("left", 1), time.monotonic() + LINGER
            hosting = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            while hosting and left < self.world and time.monotonic() < until:
                time.sleep(0.02)
                left = self._store.add("left", 0)
        with suppress(Exception):
            dist.destroy_process_group()

    def _beat(self) -> None:
        with suppress(Exception):
            while not self._ended.wait(BEAT):
                self._store.add(f"beat/{self.rank}", 1)

    def _meet(self) -> None:
        """Waits in the store until all ranks have come."""
        self._met += 1
        name, pause = f"met/{self._met}", 0.001
        beats, heard = [-1] * self.world, [0.0] * self.world
        with _connected():
            here = int(self._store.add(name, 1))
        while here < self.world:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            self._check()
            self._listen(beats, heard)
            with _connected():
                here = int(self._store.add(name, 0))

    def _check(self) -> None:
        with _connected():
            said = self._store.get("failed") if self._store.check(["failed"]) else None
        if said is not None:
            first = Failure(*map(int, said.split()))
            raise error_with(first.code, f"rank {first.rank} ended the run.")

    def _listen(self, beats: list[int], heard: list[float]) -> None:
        now = time.monotonic()
        for rank in range(self.world):
            if now < heard[rank] + BEAT:
                continue
            with _connected():
                beat = int(self._store.add(f"beat/{rank}", 0))
            if beat != beats[rank]:
                beats[rank], heard[rank] = beat, now
            elif now > heard[rank] + PATIENCE:
                raise _gone(f"rank {rank}")

    def _unpacked(self, data: bytes) -> Any:
        import torch
        from torch.serialization import default_restore_location

        def place(storage: Any, location: str) -> Any:
            return default_restore_location(storage, "cpu" if location == "cpu" else self._device)

        # safe: the data come from the other processes of this very run
        return torch.load(BytesIO(data), map_location=place, weights_only=False)


ALONE = Ranks()


def ranks_of_environment() -> Ranks:
    """The ranks that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK); without these variables, one process."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return Group(rank, world, int(os.environ.get("LOCAL_RANK", rank))) if world > 1 else Ranks()
    except ValueError:
        return Ranks()


def _placed(device: str, local: int) -> tuple[str, str]:
    """The device of process number `local` of a machine, and the backend of torch.distributed for that device."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "npu":
        with suppress(ImportError):
            import torch_npu  # noqa: F401  # which brings hccl
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
    """Gathers the bytes of all ranks; all_gather_object would copy them twice more."""
    import torch
    import torch.distributed as dist

    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    mine = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(found, mine)
    return [each[: int(size)].numpy().tobytes() for each, size in zip(found, sizes, strict=True)]


def _gone(who: str) -> OctavoError:
    return DeviceError(f"{who} of this run is gone. Run again, a capture with --resume.")


@contextmanager
def _connected() -> Iterator[None]:
    """Turns an error of the connection inside, as when a process dies, into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        raise _gone("another process") from error
