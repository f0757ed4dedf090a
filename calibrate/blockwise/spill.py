"""Stores the outputs of blocks on disk, a file for each block. The system keeps the files in its page cache as far as
memory allows, and they count for no process's resident memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.capture.files import OutputFile, scratch, storage
from octavo.capture.store.blobs import memory_of
from octavo.capture.store.headers import Stored
from octavo.capture.tensors import read_tensor, torch_dtype

from ..replay.calls import replaced


class Place(NamedTuple):
    """A tensor in a file: contiguous there, with `stride` in memory."""

    path: Path
    stored: Stored
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Reads the tensor, bit for bit and with its strides: kernels may round differently for other strides."""
        tensor = read_tensor(self.path, self.stored)
        if tensor.stride() == self.stride:
            return tensor
        return torch.empty_strided(self.stored.shape, self.stride, dtype=torch_dtype(self.stored)).copy_(tensor)

    def filled(self, value: float) -> Tensor:
        """A floating-point tensor of one value, with the strides of this one."""
        return torch.empty_strided(self.stored.shape, self.stride, dtype=torch_dtype(self.stored)).fill_(value)


class Writing:
    """Appends values to one file."""

    def __init__(self, path: Path, sink: OutputFile) -> None:
        self.path, self._sink, self._offset = path, sink, 0

    def put(self, value: Any) -> Any:
        """`value` with a Place for each tensor. Raises StorageError when the disk is full."""
        return replaced(value, Tensor, self._put)

    def _put(self, tensor: Tensor) -> Place:
        plain = tensor.detach().cpu()
        whole = plain.contiguous()
        stride = plain.stride() if 0 not in plain.stride() else whole.stride()  # a tensor of stride 0 cannot be filled
        with storage(self.path):
            self._sink.write(memory_of(whole))
        stored = Stored(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), self._offset, plain.nbytes)
        self._offset += plain.nbytes
        return Place(self.path, stored, stride)


class Spill:
    """Numbered spill files in `directory`, which the caller removes."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._count = directory, 0

    def path(self) -> Path:
        """A path that no other file of this Spill has."""
        self._count += 1
        return self.directory / f"spill-{self._count}"

    @contextmanager
    def writing(self) -> Iterator[Writing]:
        """Opens a new file for values to be put into."""
        path = self.path()
        with scratch(path) as sink:
            yield Writing(path, sink)


def floating(value: Any) -> bool:
    """Whether all tensors in a value that `put` returned are floating-point."""
    kinds: list[bool] = []
    replaced(value, Place, lambda place: kinds.append(torch_dtype(place.stored).is_floating_point))
    return all(kinds)
