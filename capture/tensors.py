"""Writes safetensors files one tensor at a time, and reads them with checks of size.

Each tensor is made just before it is written, is written from its own memory, and is freed afterwards. Writing a file
therefore needs the memory of one tensor only. If a written tensor is memory-mapped, its pages leave resident memory.
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

_ORDER = (  # dtypes, from the last to the first in the order in which the safetensors library writes them
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip


class Planned(NamedTuple):
    """A tensor that will be written: its dtype, its shape, and the function `make` that makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Planned":
        """Returns a Planned for a tensor that exists already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str], mode: int) -> None:
    """Writes a safetensors file, which must not exist yet, with the file mode `mode`.

    `tensors` maps the name of each tensor to the Planned that makes it, `metadata` names to texts. The bytes of the
    file do not depend on the order of these two dicts. `safetensors.torch.save_file` would write the same bytes, except
    that it does not sort the metadata.
    """
    # the widest elements first, so that every tensor is aligned for its dtype
    order = sorted(tensors, key=lambda name: (-_ORDER.index(NAMES[tensors[name].dtype]), name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    offset = 0
    for name in order:
        planned = tensors[name]
        end = offset + planned.bytes
        entries[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [offset, end]}
        offset = end
    with create(path, mode) as sink:
        sink.write(header_of(entries))
        for name in order:
            tensor = tensors[name].make().detach()
            if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].shape:
                raise AssertionError(f"{name} is not what was planned")
            sink.write(memory_of(tensor.cpu().contiguous()))
            page_out(tensor)


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """Reads from the file at `path` the tensor that `stored`, its entry in the header, describes.

    A tensor of 256 KiB (LARGE) or more gets memory pages of its own, which return to the system when the tensor is
    freed. On the heap the freed memory would stay unused, because later weights rarely fit into the gap. Raises
    FileError if the tensor is larger than the memory of this machine, or if the file ends too early.
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
    """Returns torch's dtype of a stored tensor."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns torch's name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
