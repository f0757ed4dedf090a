"""Stores the outputs of blocks on disk, one file for each block.

The operating system keeps these files in its page cache as far as memory allows; the page cache does not count as
resident memory of a process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.capture.files import OutputFile, scratch, storage
from octavo.capture.store.blobs import memory_of
from octavo.capture.store.headers import Stored
from octavo.capture.tensors import dtype_name, read_tensor, torch_dtype

from ..replay.calls import replaced


class SpilledTensor(NamedTuple):
    """A tensor that was written to a file: `stored` has its dtype, its shape and its position in the file. In the file
    the tensor is contiguous; in memory it had the strides `stride`."""

    path: Path
    stored: Stored
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Reads the tensor from the file, with the values and strides that it had when it was written. The strides are
        kept because kernels may round differently for other strides."""
        tensor = read_tensor(self.path, self.stored)
        if tensor.stride() == self.stride:
            return tensor
        return torch.empty_strided(self.stored.shape, self.stride, dtype=torch_dtype(self.stored)).copy_(tensor)

    def filled(self, value: float) -> Tensor:
        """Returns a tensor filled with `value`, with the dtype, shape and strides of the tensor that was written. The
        dtype has to be floating-point."""
        return torch.empty_strided(self.stored.shape, self.stride, dtype=torch_dtype(self.stored)).fill_(value)


class SpillFile:
    """A file that tensors are appended to."""

    def __init__(self, path: Path, sink: OutputFile) -> None:
        self.path, self._sink, self._offset = path, sink, 0

    def put(self, value: Any) -> Any:
        """Appends the tensors inside `value`, a tensor or a nested container of tensors, to the file. Returns `value`
        with a SpilledTensor in place of each tensor. Raises StorageError if the file cannot be written, as on a full
        disk."""
        return replaced(value, Tensor, self._put)

    def _put(self, tensor: Tensor) -> SpilledTensor:
        on_cpu = tensor.detach().cpu()
        contiguous = on_cpu.contiguous()
        # a tensor with a stride of 0 cannot be filled
        stride = on_cpu.stride() if 0 not in on_cpu.stride() else contiguous.stride()
        with storage(self.path):
            self._sink.write(memory_of(contiguous))
        stored = Stored(dtype_name(on_cpu.dtype), tuple(on_cpu.shape), self._offset, on_cpu.nbytes)
        self._offset += on_cpu.nbytes
        return SpilledTensor(self.path, stored, stride)


class Spill:
    """Creates numbered files for block outputs in `directory`. The caller removes the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._count = directory, 0

    def path(self) -> Path:
        """Returns the path for the next file, a path that no earlier file of this Spill has."""
        self._count += 1
        return self.directory / f"spill-{self._count}"

    @contextmanager
    def writing(self) -> Iterator[SpillFile]:
        """Creates a new file, and yields a SpillFile that values can be written to inside the `with` statement."""
        path = self.path()
        with scratch(path) as sink:
            yield SpillFile(path, sink)


def floating(value: Any) -> bool:
    """Returns whether all tensors in `value` are floating-point, so that they can be filled with NaN. `value` is a
    result of `SpillFile.put`, in which a SpilledTensor stands for each tensor."""
    kinds: list[bool] = []
    replaced(value, SpilledTensor, lambda place: kinds.append(torch_dtype(place.stored).is_floating_point))
    return all(kinds)
