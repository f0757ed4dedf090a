"""Loads the weights of a module into memory while the module computes. At other times the weights are views of
memory-mapped files ("parked")."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.files import scratch, storage
from octavo.capture.paging import page_out
from octavo.capture.store.blobs import memory_of

from ..plan import Plan

_ALIGNED = 64  # bytes; alignment of stored tensors, the same as torch's: kernels may round differently for another
Cast = Callable[[Tensor], Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """Returns `tensor` itself. It is the default of the argument `cast` of Parking, for a model that will run in the
    dtype that its weights already have."""
    return tensor


class _Slot(NamedTuple):
    """A `tensor` of a module, and where the module keeps it: as `table[leaf]`, where `table` is the module's dict of
    parameters or of buffers."""

    table: dict[str, Tensor | None]
    leaf: str
    tensor: Tensor

    def put(self, values: Tensor) -> None:
        tensor = nn.Parameter(values, requires_grad=False) if isinstance(self.tensor, nn.Parameter) else values
        self.table[self.leaf] = tensor


class Parking:
    """Loads the tensors of modules into the memory of `device`, and parks the modules again. The tensors of a parked
    module are views of memory-mapped files. `cast` converts each loaded tensor to the dtype in which the model will
    run.

    A module that was changed while it was in memory is parked in a new file in `directory`.
    """

    def __init__(self, directory: Path, device: torch.device, cast: Cast = unchanged) -> None:
        self._directory, self.device, self._cast = directory, device, cast
        self._parked: dict[str, list[_Slot]] = {}  # by fetched module: its slots with the tensors from before
        self._written: set[str] = set()  # modules whose tensors are in files of `directory`

    def bytes_of(self, module: nn.Module) -> int:
        """Returns the bytes of memory that the parameters and buffers of `module` will take after `fetch` has loaded
        and cast them."""
        return self._bytes(_slots(module))

    def _bytes(self, slots: Iterable[_Slot]) -> int:
        tensors = {id(slot.tensor): slot.tensor for slot in slots}
        return sum(self._cast(x.new_empty(0)).itemsize * x.numel() for x in tensors.values())

    def with_bytes(self, model: nn.Module, plan: Plan) -> Plan:
        """Returns a copy of `plan` in which `bytes`, in the entry of each layer, is the size in memory of the layer's
        parameters and buffers in `model` after they are loaded and cast."""
        entries = (replace(e, bytes=self._bytes(_own(model.get_submodule(e.name)))) for e in plan.entries)
        return Plan(tuple(entries))

    def settle(self, model: nn.Module, names: Iterable[str]) -> None:
        """Loads every tensor of `model` into memory for good, except the tensors of the modules `names`, which `fetch`
        loads later, one module at a time."""
        inside = {id(part) for name in names for part in model.get_submodule(name).modules()}
        self._bring((slot for part in model.modules() if id(part) not in inside for slot in _own(part)), self._cast)

    def fetch(self, name: str, module: nn.Module) -> None:
        """Loads the tensors of `module`, the module `name` of the model, into memory, so that it can compute."""
        self._parked[name] = list(_slots(module))
        self._bring(self._parked[name], unchanged if name in self._written else self._cast)

    def _bring(self, slots: Iterable[_Slot], cast: Cast) -> None:
        loaded: dict[int, Tensor] = {}  # by id: several modules may share a tensor
        for slot in slots:
            values = loaded.setdefault(id(slot.tensor), cast(slot.tensor.detach()).to(self.device))
            if values.data_ptr() != slot.tensor.data_ptr():
                slot.put(values)

    def park(self, name: str) -> None:
        """Frees the tensors that `fetch` loaded for the module `name`, which then has its memory-mapped tensors
        again."""
        for slot in self._parked.pop(name):
            slot.table[slot.leaf] = slot.tensor
            page_out(slot.tensor)

    def keep(self, name: str, module: nn.Module) -> None:
        """Parks `module`, the module `name` of the model, which was changed after `fetch` loaded it: writes its new
        tensors to a file, and replaces them by memory-mapped views of the file."""
        before = self._parked.pop(name)
        addresses = {slot.tensor.data_ptr() for slot in before}
        changed = [slot for slot in _slots(module) if slot.tensor.data_ptr() not in addresses and slot.tensor.numel()]
        path = self._directory / f"weights-{len(self._written)}"
        with scratch(path) as sink:
            for slot in changed:
                with storage(path):
                    sink.write(memory_of(slot.tensor.detach().cpu().contiguous()))
                    sink.write(bytes(-slot.tensor.nbytes % _ALIGNED))
        for slot, mapped in zip(changed, _mapped(path, [slot.tensor for slot in changed]), strict=True):
            slot.put(mapped)
        for slot in before:
            page_out(slot.tensor)
        self._written.add(name)


def _slots(module: nn.Module) -> Iterator[_Slot]:
    for part in module.modules():
        yield from _own(part)


def _own(part: nn.Module) -> Iterator[_Slot]:
    tables: list[dict[str, Tensor | None]] = [part._parameters, part._buffers]  # type: ignore[list-item]
    for table in tables:
        for leaf, tensor in list(table.items()):
            if tensor is not None:
                yield _Slot(table, leaf, tensor)


def _mapped(path: Path, templates: list[Tensor]) -> Iterator[Tensor]:
    """Yields the tensors in the file `path`, memory-mapped, in the order in which they were written. `templates` are
    tensors with the same dtypes and shapes, in the same order. In the file each tensor begins at a multiple of _ALIGNED
    bytes."""
    if not templates:
        return
    whole: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    start = 0
    for tensor in templates:
        flat = torch.empty(0, dtype=torch.uint8).set_(whole, start, (tensor.nbytes,), (1,))
        yield flat.view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes + -tensor.nbytes % _ALIGNED
