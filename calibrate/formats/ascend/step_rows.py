"""Converts the input scales, zero points, deq and quant_bias of a W8A8_TIMESTEP layer from one row for each timestep
bin (interval of noise levels) to one row for each denoising step of a run, as MindIE-SD reads them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import UsageError

from ...layers.modules import QuantizedLayer
from ...layers.noise_level import bins_of


class StepRows(NamedTuple):
    """Holds which timestep bins of a W8A8_TIMESTEP layer the denoising steps of a run fall into.

    `bins` (steps,) has the index of the bin for each step. Bins that contain no step are not written. If n bins contain
    a step, `edges` (n - 1,) are noise levels that separate these n bins.
    """

    bins: Tensor
    edges: Tensor


def step_rows(edges: Tensor, levels: Sequence[float]) -> StepRows:
    """Returns the timestep bin of a layer that each denoising step of a run falls into, and noise levels that separate
    the bins that have a step.

    `edges` are the noise levels that separate all of the layer's bins, increasing; `levels` are the noise levels of the
    steps, in the order of the steps.
    """
    bins = bins_of(torch.tensor(levels, dtype=torch.float32, device=edges.device), edges)
    used = bins.unique()
    return StepRows(bins, edges[(used[:-1] + used[1:] - 1) // 2])  # one edge between neighbouring used bins


def deployed_levels(layers: Mapping[str, QuantizedLayer], timesteps: Iterable[float] | None) -> tuple[float, ...]:
    """Returns the noise levels for which each W8A8_TIMESTEP layer gets a row of numbers (input scale, zero point, deq,
    quant_bias), rounded to float32; () if there are no such layers.

    The noise levels are `timesteps`, the noise levels of the denoising steps. If `timesteps` is None or empty, they are
    chosen so that at least one lies in each timestep bin of each layer, and sorted from high to low. Raises UsageError
    for timesteps that are not finite.
    """
    edges_of_layers = [layer.edges for layer in layers.values() if layer.input_type.by_level]
    if not edges_of_layers:
        return ()
    levels = [] if timesteps is None else [float(level) for level in timesteps]
    if not levels:
        edges = torch.cat([edges.cpu() for edges in edges_of_layers]).unique()  # an edge is in the bin above it
        lowest = torch.nextafter(edges[:1], torch.tensor(-torch.inf)) if len(edges) else torch.zeros(1)
        levels = torch.cat([lowest, edges]).flip(0).tolist()
    rounded = torch.tensor(levels, dtype=torch.float32)
    if not bool(rounded.isfinite().all()):
        raise UsageError("timesteps: not all are finite numbers. Give the noise levels of the denoising steps.")
    return tuple(rounded.tolist())
