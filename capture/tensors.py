"""Writes safetensors files from the tensors' own memory, one tensor at a time, and reads them with limits.

A tensor is made just before it is written and freed afterwards, so that writing needs the memory of one; mapped tensors
leave memory too.
"""

import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import damage
from .files import create
from .paging import page_out
from .sealed import open_regular, pread
from .store.blobs import NAMES, memory_of
from .store.parts import HEADER_LIMIT, Stored, header_of, placed

_LARGE = 1 << 18  # bytes; a tensor from this size on is read into memory pages of its own
_ORDER = (  # dtypes in the order in which safetensors itself sorts tensors, from the last to the first
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip


class Planned(NamedTuple):
    """A tensor to write: its dtype, its shape, and a function that makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Planned":
        """Plans to write a tensor that exists already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str], mode: int) -> None:
    """Writes a file that does not exist yet, with the same bytes for any order of the same tensors.

    The bytes are those of `safetensors.torch.save_file`, which keeps no order of several metadata.
    """
    # the widest elements first, so that every tensor is aligned for its dtype
    order = sorted(tensors, key=lambda name: (-_ORDER.index(NAMES[tensors[name].dtype]), name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    offset = 0
    for name in order:
        planned = tensors[name]
        place = [offset, offset + planned.bytes]
        entries[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": place}
        offset = place[1]
    with create(path, mode) as sink:
        sink.write(header_of(entries))
        for name in order:
            tensor = tensors[name].make().detach()
            if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].shape:
                raise AssertionError(f"{name} is not what was planned")
            sink.write(memory_of(tensor.cpu().contiguous()))
            page_out(tensor)


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Reads the tensors' places and the metadata of a file. Raises FileError unless the tensors cover the file without
    gap or overlap."""
    with open_regular(path) as (descriptor, size):
        prefix = bytearray(min(8, size))
        pread(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise damage(path, "truncated or not a safetensors file")
        text = bytearray(length)
        pread(descriptor, memoryview(text), 8, path)
    try:
        entries = json.loads(bytes(text))
        metadata = entries.pop("__metadata__", {})
        return placed(entries, 8 + length, size), {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damage(path, f"damaged ({error})") from error


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """Reads one tensor of a file. A large tensor gets memory pages of its own, which return to the system with it: on
    the heap, where weights are packed one after the other, its hole would fit nothing that comes later.

    Raises FileError for a tensor larger than the memory of this machine.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if stored.bytes > memory:
        fact = f"a tensor of {stored.bytes >> 30} GiB, more than this machine's memory of {memory >> 30} GiB"
        raise damage(path, fact, "Copy it anew or use a larger machine.")
    if stored.bytes < _LARGE:
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
    else:
        tensor = torch.frombuffer(mmap.mmap(-1, stored.bytes), dtype=stored.dtype).view(stored.shape)
    if stored.bytes:
        with open_regular(path) as (descriptor, _):
            pread(descriptor, memory_of(tensor), stored.offset, path)
    return tensor
