"""Joins the checkpoints of several denoisers of one pipeline, so that they can be compared as if they were one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.capture.errors import FileError

from .checkpoints import Deployed, checkpoints_at, chosen_place, is_checkpoint, load_deployed


def places_in(out: Path, component: str | None) -> list[Path]:
    """Returns the paths of the checkpoints to load: `out` itself if it is a checkpoint, otherwise the checkpoints in
    its direct subfolders, one for each denoiser. Without any checkpoint, returns [`out`], so that loading it raises the
    error.

    If `component` is given, and the subfolders hold several checkpoints, returns only that of this denoiser. Raises
    UsageError if none of several checkpoints is of `component`, or if two are of the same denoiser.
    """
    if is_checkpoint(out):
        return [out]
    places = checkpoints_at(out)
    if component is not None and places:
        places = {component: chosen_place(out, places, component)}
    return list(places.values()) or [out]


def load_joined(pipe: Any, places: Sequence[Path], component: str | None, device: torch.device) -> Deployed:
    """Loads the checkpoints at `places` on `device`, pairs each with the denoiser of `pipe` that it was made from, and
    returns the pairs as one `Deployed`, which holds float denoisers with their quantized forms. If there are several
    pairs, the names of modules and layers in the result begin with the name of their denoiser. If `component` is not
    None, every checkpoint is paired with this denoiser.

    Raises FileError for damaged files and for two checkpoints of the same denoiser, MisfitError for a checkpoint that
    was made from another model.
    """
    parts = [load_deployed(pipe, place, component, device) for place in places]
    if len(parts) == 1:
        return parts[0]
    names = [part.component for part in parts]
    if len(set(names)) < len(names):
        raise FileError(f"{places[0].parent}: holds two checkpoints of {names[0]}. Give one of them.")

    @contextmanager
    def installed() -> Iterator[nn.Module]:
        with ExitStack() as stack:
            yield _module_dict(names, [stack.enter_context(part.installed()) for part in parts])

    layers = [
        row | {"name": f"{part.component}.{row['name']}"} for part in parts for row in part.report.get("layers", [])
    ]
    first = parts[0].report
    return Deployed(
        " and ".join(names), _module_dict(names, [part.module for part in parts]), installed,
        first | {"layers": layers, "totals": _joined_totals(parts)} if first else {}, parts[0].runs_on,
        tuple(map(_key, names)),
    )  # fmt: skip


def _module_dict(names: list[str], modules: list[nn.Module]) -> nn.Module:
    return nn.ModuleDict({_key(name): module for name, module in zip(names, modules, strict=True)})


def _key(name: str) -> str:
    return name.replace(".", "_")  # a ModuleDict refuses names with dots


def _joined_totals(parts: list[Deployed]) -> dict[str, Any]:
    """Returns one dict `totals` for several checkpoints, from the dict `totals` in the report of each of `parts`. The
    output SQNR is the lowest SQNR of all checkpoints, and its confidence interval is None. Every other number, such as
    a count of layers or bytes, is the sum over all checkpoints."""
    totals = [part.report.get("totals", {}) for part in parts]
    joined: dict[str, Any] = {}
    for name in totals[0]:
        values = [total.get(name) for total in totals]
        numbers = [value for value in values if isinstance(value, (int, float))]
        joined[name] = (min if name.endswith("sqnr") else sum)(numbers) if numbers else None
    return joined
