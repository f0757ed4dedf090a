"""Weights that are in memory only while they are at work; otherwise they are parts of mapped files."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .plan import Plan
from .tensors import Planned, write_tensors
from .weights import page_out

Cast = Callable[[Tensor], Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """No other dtype."""
    return tensor


class Parking:
    """Brings modules to `device`, in the dtype that `cast` gives, and parks them again.

    A module is written to `directory` once it has become another one; its tensors are then parts of that file.
    """

    def __init__(self, directory: Path, device: torch.device, cast: Cast = unchanged) -> None:
        self._directory, self.device, self._cast = directory, device, cast
        self._parked: dict[str, dict[str, Tensor]] = {}  # by name of the module
        self._written: set[str] = set()

    def bytes_of(self, module: nn.Module) -> int:
        """What a module takes once it is fetched."""
        return sum(self._cast(x.data[:0]).itemsize * x.numel() for x in _tensors(module).values() if x.ndim)

    def costs(self, model: nn.Module, plan: Plan) -> Plan:
        """The plan with the bytes that its layers take once they are fetched."""
        entries = (replace(entry, bytes=self.bytes_of(model.get_submodule(entry.name))) for entry in plan.entries)
        return Plan(tuple(entries))

    def settle(self, model: nn.Module, names: Iterable[str]) -> None:
        """Brings what is in none of the modules `names` into memory for good."""
        inside = tuple(f"{name}." for name in names)
        for key, tensor in _tensors(model).items():
            if not key.startswith(inside):
                tensor.data = self._cast(tensor.data).to(self.device)

    def fetch(self, name: str, module: nn.Module) -> None:
        """Makes `module` ready to compute."""
        cast = unchanged if name in self._written else self._cast
        self._parked[name] = {}
        for key, tensor in _tensors(module).items():
            self._parked[name][key] = tensor.data
            tensor.data = cast(tensor.data).to(self.device)

    def park(self, name: str, module: nn.Module) -> None:
        """Lets go what `fetch` made; `module` has the tensors it had."""
        for key, tensor in _tensors(module).items():
            tensor.data = self._parked[name][key]
            page_out(tensor.data)
        del self._parked[name]

    def keep(self, name: str, module: nn.Module) -> None:
        """Parks a fetched module as it has become."""
        path = self._directory / f"weights-{len(self._written)}"
        module.to("cpu")
        write_tensors(path, {key: Planned.of(tensor) for key, tensor in module.state_dict().items()}, {}, 0o600)
        module.load_state_dict(load_file(path), assign=True)
        for tensor in self._parked.pop(name).values():
            page_out(tensor)
        for tensor in _tensors(module).values():
            page_out(tensor.data)
        self._written.add(name)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
