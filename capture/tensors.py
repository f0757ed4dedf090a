"""Writes safetensors files from the tensors' own memory, one tensor at a time, and reads them with limits.

A tensor is made just before it is written and freed afterwards, so that writing needs the memory of one; mapped tensors
leave memory too.
"""

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arrays import LARGE, check_memory, read_into
from .files import create
from .paging import page_out
from .store.blobs import NAMES, memory_of
from .store.headers import Stored, header_of

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


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """Reads one tensor of a file. A large tensor gets memory pages of its own, which return to the system with it: on
    the heap, where weights are packed one after the other, its hole would fit nothing that comes later.

    Raises FileError for a tensor larger than the memory of this machine.
    """
    check_memory(path, stored)
    dtype = torch_dtype(stored)
    if stored.bytes < LARGE:
        tensor = torch.empty(stored.shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(mmap.mmap(-1, stored.bytes), dtype=dtype).view(stored.shape)
    read_into(path, stored, memory_of(tensor))
    return tensor


def torch_dtype(stored: Stored) -> torch.dtype:
    """The dtype of a stored tensor."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return dtype
