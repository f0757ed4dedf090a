"""Picks the calls to replay, when not all are replayed: those whose arguments differ most. No model runs for this.

Farthest-point traversal (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985): first the call
farthest from the mean, then again and again the call farthest from all calls taken. With k calls taken, no call is
farther from them than twice the distance for the best k. So the extremes that decide ranges are among the first.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.capture.call_arguments import TIME_ARGUMENTS, noise_level
from octavo.capture.ranks import ALONE, Ranks

from .calls import Call
from .current_call import held_out

_GROUPS = 64  # most groups of neighbouring channels in a descriptor, which stays small for wide prompts
_SAME = 1e-6  # deviation over the largest magnitude of a column: below it a column does not vary


class Descriptor(NamedTuple):
    """The description of a call: its noise `level` (None without one), `statistics` (3, groups) float64 of its floating
    tensors by path (low, high and mean square of groups of channels), and whether the call is `held` out."""

    level: float | None
    statistics: dict[str, Tensor]
    held_out: bool


def descriptor_of(call: Call) -> Descriptor:
    """Describes a call. A time argument, known by its name, counts as the level alone."""
    level, unit = getattr(call, "timestep", None), getattr(call, "unit", None)
    kwargs = {name: value for name, value in call.kwargs.items() if name not in TIME_ARGUMENTS}
    statistics = {path: statistics_of(x) for path, x in floats_in([list(call.args), kwargs]) if x.numel()}
    level = noise_level(call.kwargs) if level is None else float(level)
    return Descriptor(level, statistics, unit is not None and held_out(unit))


def floats_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the real floating-point tensors inside containers, with the path of each."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in pairs:
        yield from floats_in(part, f"{path}.{key}")


def statistics_of(x: Tensor) -> Tensor:
    """Low, high and mean square of groups of channels, (3, groups). Channels are the last axis of up to three, else the
    second, as in images and videos. Values that are not finite count as 0: the replay reports them."""
    channels = x.ndim - 1 if x.ndim <= 3 else 1
    rows = x.detach().to(torch.float32).nan_to_num(0.0, 0.0, 0.0).reshape(x.shape or (1,))
    rows = rows.movedim(channels, -1).flatten(0, -2) if rows.ndim > 1 else rows[None]  # (rows, channels)
    low, high, square = rows.amin(0), rows.amax(0), rows.square().mean(0)
    size = -(-len(low) // _GROUPS)
    groups = torch.arange(-(-len(low) // size) * size, device=x.device).clamp(max=len(low) - 1).view(-1, size)
    return torch.stack([low[groups].amin(1), high[groups].amax(1), square[groups].mean(1)]).to("cpu", torch.float64)


def farthest(calls: Iterable[Call], wanted: int, ranks: Ranks = ALONE) -> list[int]:
    """The positions of the `wanted` farthest calls, ascending; all where there are no more. Needs one call's memory.

    Held-out calls (survey.py) get their share of the positions, at least one where there are both kinds and more than
    one is wanted. Collective: `ranks` share the reading of the calls.
    """
    parts = ranks.gather([descriptor_of(call) for position, call in enumerate(calls) if ranks.owns(position)])
    descriptors = interleaved(parts)
    if wanted >= len(descriptors):
        return list(range(len(descriptors)))
    held_out = torch.tensor([descriptor.held_out for descriptor in descriptors])
    share = round(wanted * int(held_out.sum()) / len(held_out))
    if wanted > 1 and 0 < int(held_out.sum()) < len(held_out):
        share = min(max(share, 1), wanted - 1)
    return sorted(_traversed(points_of(descriptors), held_out, {True: share, False: wanted - share}))


def interleaved(parts: Sequence[Sequence[Descriptor]]) -> list[Descriptor]:
    """The descriptors of all ranks' `parts`, in the order of the calls."""
    return [descriptor for row in itertools.zip_longest(*parts) for descriptor in row if descriptor is not None]


def points_of(descriptors: Sequence[Descriptor]) -> Tensor:
    """The calls as points, (calls, coordinates) float64. The noise level and each tensor have the mean square 1, so
    that each counts the same for any number of channels."""
    levels = torch.tensor(
        [[0.0 if descriptor.level is None else descriptor.level] for descriptor in descriptors], dtype=torch.float64
    )
    blocks = [levels]
    for path in dict.fromkeys(path for descriptor in descriptors for path in descriptor.statistics):
        tensors = [descriptor.statistics.get(path) for descriptor in descriptors]
        if (
            len({len(x[0]) for x in tensors if x is not None}) > 1
        ):  # numbers of groups differ: make the tensor one group
            tensors = [None if x is None else torch.stack([x[0].amin(), x[1].amax(), x[2].mean()]) for x in tensors]
        present = torch.tensor([x is not None for x in tensors])
        rows = torch.stack([x.flatten() for x in tensors if x is not None])
        block = rows.mean(0).repeat(len(tensors), 1)  # a call without the tensor is at the mean
        block[present] = rows
        blocks.append(block)
    return torch.cat([_scaled(block) for block in blocks], 1)


def _scaled(block: Tensor) -> Tensor:
    """Scales a block (calls, n) to mean 0 and the same deviation of each column, without columns that do not vary."""
    centred = block - block.mean(0)
    deviation = centred.square().mean(0).sqrt()
    varies = deviation > _SAME * block.abs().amax(0)
    return centred[:, varies] / deviation[varies] / max(int(varies.sum()), 1) ** 0.5


def _traversed(points: Tensor, held_out: Tensor, remaining: dict[bool, int]) -> Iterator[int]:
    """Yields positions of points, farthest first, the first of equal ones; of each kind as many as are `left`."""
    distance, nearest = points.square().sum(1), None
    while any(remaining.values()):
        allowed = torch.where(held_out, remaining[True] > 0, remaining[False] > 0)
        position = int(torch.where(allowed, distance, -2.0).argmax())
        yield position
        remaining[bool(held_out[position])] -= 1
        new_distance = (points - points[position]).square().sum(1)
        distance = nearest = new_distance if nearest is None else torch.minimum(nearest, new_distance)
        distance[position] = -1.0  # never again, even where all others are the same
