"""Treats the checkpoints of several denoisers of one pipeline as one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.capture.errors import FileError

from .checkpoints import Deployed, checkpoints_at, chosen_place, is_checkpoint, load_deployed


def places_in(out: Path, component: str | None) -> list[Path]:
    """The checkpoint at `out`, or those in it, of which `component` chooses one. Raises as `checkpoints_at` does."""
    if is_checkpoint(out):
        return [out]
    places = checkpoints_at(out)
    if component is not None and places:
        places = {component: chosen_place(out, places, component)}
    return list(places.values()) or [out]


def load_joined(pipe: Any, places: Sequence[Path], component: str | None, device: torch.device) -> Deployed:
    """The integers at `places` and the denoisers of `pipe` they are of, as one. Raises as `load_deployed` does, and
    FileError for two checkpoints of one denoiser."""
    parts = [load_deployed(pipe, place, component, device) for place in places]
    if len(parts) == 1:
        return parts[0]
    names = [part.component for part in parts]
    if len(set(names)) < len(names):
        raise FileError(f"{places[0].parent}: holds two checkpoints that are of {names[0]}. Give one of them.")

    @contextmanager
    def installed() -> Iterator[nn.Module]:
        with ExitStack() as stack:
            yield _together(names, [stack.enter_context(part.installed()) for part in parts])

    layers = [
        row | {"name": f"{part.component}.{row['name']}"} for part in parts for row in part.report.get("layers", [])
    ]
    first = parts[0].report
    return Deployed(
        " and ".join(names), _together(names, [part.module for part in parts]), installed,
        first | {"layers": layers, "totals": _sums(parts)} if first else {}, parts[0].runs_on,
        tuple(map(_key, names)),
    )  # fmt: skip


def _together(names: list[str], modules: list[nn.Module]) -> nn.Module:
    return nn.ModuleDict({_key(name): module for name, module in zip(names, modules, strict=True)})


def _key(name: str) -> str:
    return name.replace(".", "_")  # a ModuleDict refuses dots


def _sums(parts: list[Deployed]) -> dict[str, Any]:
    """The totals of several reports: counts and bytes are added, the worst output SQNR is kept, not its interval."""
    totals = [part.report.get("totals", {}) for part in parts]
    joined: dict[str, Any] = {}
    for name in totals[0]:
        values = [total.get(name) for total in totals]
        known = [value for value in values if isinstance(value, (int, float))]
        joined[name] = (min if name.endswith("sqnr") else sum)(known) if known else None
    return joined
