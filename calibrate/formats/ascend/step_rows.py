"""Converts bins of noise levels to the rows that a consumer reads: one for each denoising step of a deployment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import UsageError

from ...layers.modules import QuantizedLayer
from ...layers.noise_level import bins_of


class StepRows(NamedTuple):
    """The rows of a layer: `bins` (steps,) is its bin at each step, `edges` lie between the bins that steps fall in."""

    bins: Tensor
    edges: Tensor


def rows_of(edges: Tensor, levels: Sequence[float]) -> StepRows:
    """The rows of a layer with these `edges` for a deployment that calls it at these noise levels, in this order."""
    bins = bins_of(torch.tensor(levels, dtype=torch.float32, device=edges.device), edges)
    used = bins.unique()
    return StepRows(bins, edges[(used[:-1] + used[1:] - 1) // 2])  # an edge above one bin and not above the next


def deployed_levels(layers: Mapping[str, QuantizedLayer], timesteps: Iterable[float] | None) -> tuple[float, ...]:
    """The noise level of each row, as float32 holds it: `timesteps`, or one level in each bin, from noise to none.

    All layers have the same rows. Raises UsageError for timesteps that are not finite.
    """
    timed = [layer.edges for layer in layers.values() if layer.input_type.by_level]
    if not timed:
        return ()
    levels = [] if timesteps is None else [float(level) for level in timesteps]
    if not levels:
        edges = torch.cat([each.cpu() for each in timed]).unique()  # an edge is in the bin above it
        lowest = torch.nextafter(edges[:1], torch.tensor(-torch.inf)) if len(edges) else torch.zeros(1)
        levels = torch.cat([lowest, edges]).flip(0).tolist()
    found = torch.tensor(levels, dtype=torch.float32)
    if not bool(found.isfinite().all()):
        raise UsageError("timesteps: not all are finite numbers. Give what the denoiser is called with.")
    return tuple(found.tolist())
