"""Writes one unit of a capture, the calls of one prompt, to a staging directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import MisfitError
from ..files import Modes, create
from ..sealed import seal
from ..space import check_space
from .blobs import NAMES, check_storable, memory_of, order_of, rows_of, settle, stats_of
from .headers import key_of
from .layout import Call
from .part_writer import PART_BYTES, split_parts, write_part
from .parts import Part
from .stats import Stats, join_stats
from .tree_encoder import encode


class TensorState(NamedTuple):
    """The version counter, address, shape and strides that a tensor object had when it was stored, and the number
    `entry` of the stored tensor in the unit's list of tensors.

    While the version counter, address, shape and strides of an object are unchanged, its values are unchanged.
    """

    version: int
    pointer: int
    shape: torch.Size
    stride: tuple[int, ...]
    entry: int


class UnitWriter:
    """Stores the calls of one prompt, one by one, in the staging directory `staged`; `CaptureWriter.unit` makes it.

    `index` is the number of the unit, `info` what determines its calls (prompt, seed, steps), `key` the digest of
    `info`. Tensors or rows with the same bytes are stored once. Equal tensors are recognised by the hash of their
    bytes; a tensor object that was not changed since it was last stored is recognised without hashing. `calls`,
    `raw_bytes` and `stored_bytes` count the calls, the bytes of all their tensors and the bytes of the distinct ones.
    `last` maps the path of each float tensor in the last call, such as "added_cond_kwargs.time_ids", to its Stats
    (extremes, NaN and Inf).
    """

    def __init__(self, staged: Path, modes: Modes, index: int, key: str, info: dict[str, Any]) -> None:
        self.calls = 0
        self.raw_bytes = 0
        self.stored_bytes = 0
        self.last: dict[str, Stats] = {}
        self._staged, self._modes = staged, modes
        self._head = {"index": index, "key": key, "info": info}
        self._records: list[dict[str, Any]] = []
        self._entries: dict[tuple[str, torch.Size, tuple[str, ...], tuple[int, ...] | None], int] = {}
        self._entry_stats: list[Stats | None] = []
        self._stats: dict[str, Stats | None] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._part_of: dict[str, int] = {}
        self._parts: list[Part] = []
        self._tensor_states = WeakTensorKeyDictionary()

    def add(self, call: Call, accept: Callable[[dict[str, Stats]], bool] | None = None) -> dict[str, Stats]:
        """Stores a call; returns a dict from the path of each float tensor ("added_cond_kwargs.time_ids") to its Stats.

        Keeps no reference to the call's tensors. Does not store the call if `accept`, which receives that dict, returns
        False. Raises Unstorable for an argument that cannot be stored, StorageError if the disk is full.
        """
        before = (len(self._entries), len(self._stats), self.raw_bytes, self.stored_bytes)
        stats: dict[str, Stats] = {}
        try:
            with torch.inference_mode(False), torch.no_grad():
                record = self._encode(call, stats)
            accepted = accept is None or accept(stats)
        except BaseException:
            self._forget(*before)
            raise
        self.last = stats
        if accepted:
            self._records.append(record)
            self.calls += 1
            if self._pending_bytes >= PART_BYTES:
                self._flush(keep_last=True)
        else:
            self._forget(*before)
        return stats

    def _encode(self, call: Call, stats: dict[str, Stats]) -> dict[str, Any]:
        """Returns the call as JSON; stores its tensors, and adds path and Stats of each float tensor to `stats`."""
        owner = f"{call.component} input"

        def put(tensor: torch.Tensor, path: str) -> int:
            check_storable(tensor, path, owner)
            entry = self._put(tensor)
            self.raw_bytes += tensor.nbytes
            entry_stats = self._entry_stats[entry]
            if entry_stats is not None:
                stats[path] = entry_stats
            return entry

        return {
            "component": call.component,
            "index": call.index,
            "step": call.step,
            "timestep": encode(call.timestep, put, "timestep", owner),
            "context": call.context,
            "args": [encode(value, put, f"args[{number}]", owner) for number, value in enumerate(call.args)],
            "kwargs": [[name, encode(value, put, name, owner)] for name, value in call.kwargs.items()],
        }

    def _put(self, tensor: torch.Tensor) -> int:
        """Returns the number of a tensor in the unit's list of tensors; adds it to the list if its content is new."""
        if tensor.is_inference():  # has no version counter
            return self._put_content(tensor)
        now = (tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride())
        before = self._tensor_states.get(tensor)
        if before is not None and before[:4] == now:
            return before.entry
        entry = self._put_content(tensor)
        self._tensor_states[tensor] = TensorState(*now, entry)
        return entry

    def _put_content(self, tensor: torch.Tensor) -> int:
        """Returns the number of a tensor in the unit's list, found by hashing its bytes; adds it if its content is new.

        Keeps the new content in memory until it is written.
        """
        settled, owned = settle(tensor)
        name = NAMES[settled.dtype]
        rows = rows_of(settled)
        blobs = [settled] if rows is None else rows
        keys = tuple(key_of(name, blob.shape, memory_of(blob)) for blob in blobs)
        fresh = {key: blob for key, blob in zip(keys, blobs, strict=True) if key not in self._stats}
        keep_view = owned and len(fresh) == len(blobs)  # a view of one row would keep the whole copy alive
        for key, blob in fresh.items():
            self._stats[key] = stats_of(blob)
            self._pending[key] = blob if keep_view else blob.clone()
            self._pending_bytes += blob.nbytes
            self.stored_bytes += blob.nbytes
        entry = self._entries.setdefault((name, settled.shape, keys, order_of(tensor)), len(self._entries))
        if entry == len(self._entry_stats):
            self._entry_stats.append(join_stats([self._stats[key] for key in keys]))
        return entry

    def _forget(self, entries: int, blobs: int, raw_bytes: int, stored_bytes: int) -> None:
        """Undoes the call that is being added. The arguments are the unit's counts before that call.

        `entries` counts the tensors in the unit's list, `blobs` the distinct contents; tensors and contents that
        the call added are dropped. `raw_bytes` and `stored_bytes`, the two totals of bytes, are restored.
        """
        for entry in list(self._entries)[entries:]:
            del self._entries[entry]
        for key in list(self._stats)[blobs:]:
            del self._stats[key]
            self._pending.pop(key, None)
        del self._entry_stats[entries:]
        self._pending_bytes = sum(tensor.nbytes for tensor in self._pending.values())
        self.raw_bytes, self.stored_bytes = raw_bytes, stored_bytes
        self._tensor_states = WeakTensorKeyDictionary()

    def _flush(self, keep_last: bool) -> None:
        """Writes the tensors still in memory to data files. With `keep_last`, the tensors for the last file stay in
        memory, because tensors of later calls may be added to this file.

        Raises StorageError if the disk is full.
        """
        check_space(self._staged, self._pending_bytes)
        parts = list(split_parts(self._pending))
        last = parts.pop() if keep_last else {}
        for blobs in parts:
            number = len(self._parts)
            name = f"data-{number:03d}.safetensors"
            self._parts.append(write_part(self._staged / name, blobs, self._modes.data))
            self._part_of.update(dict.fromkeys(blobs, number))
        self._pending = last
        self._pending_bytes = sum(tensor.nbytes for tensor in last.values())

    def finish(self) -> None:
        """Writes the tensors still in memory, and unit.json. The staging directory can then be renamed to its target.

        Raises MisfitError if no call was stored.
        """
        if not self._records:
            fact = "has no calls, because none ran or all were skipped"
            raise MisfitError(f"unit {self._head['index']}: {fact}. Change --dtype or --keep.")
        self._flush(keep_last=False)
        body = self._head | {
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "parts": [part._asdict() for part in self._parts],
            "blobs": {key: [self._part_of[key], stats] for key, stats in self._stats.items()},
            "tensors": [
                [name, list(shape), list(keys), *([] if order is None else [list(order)])]
                for name, shape, keys, order in self._entries
            ],
            "calls": self._records,
        }
        with create(self._staged / "unit.json", self._modes.manifest) as sink:
            sink.write(seal(body))
