"""Picks the calls to replay when not all are replayed: the calls whose arguments differ most. No model runs for this.

Farthest-point traversal (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985): the first call
picked is the one farthest from the mean; each next call is the one farthest from all calls picked before. After k
picks, the largest distance of a call from the nearest picked call is at most twice as large as for the best k calls.
So the extremes that decide ranges are picked early.
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

_GROUPS = 64  # largest number of channel groups in a descriptor, so that descriptors of wide tensors stay small
_SAME = 1e-6  # a coordinate whose deviation over its largest magnitude is smaller counts as constant


class Descriptor(NamedTuple):
    """Describes a call by the numbers by which calls are compared.

    `level` is the call's noise level; None where it has none. `statistics` is a dict with an entry for each
    floating-point tensor in the arguments. The key is the tensor's path, such as ".1.hidden_states". The value has the
    minimum, maximum and mean square of each group of neighbouring channels, (3, groups) float64. `held_out` says
    whether the call is held out.
    """

    level: float | None
    statistics: dict[str, Tensor]
    held_out: bool


def descriptor_of(call: Call) -> Descriptor:
    """Describes a call by its noise level and the statistics of its tensors. Time arguments, recognized by their names,
    give the noise level and no statistics."""
    level, unit = getattr(call, "timestep", None), getattr(call, "unit", None)
    kwargs = {name: value for name, value in call.kwargs.items() if name not in TIME_ARGUMENTS}
    statistics = {path: statistics_of(x) for path, x in floats_in([list(call.args), kwargs]) if x.numel()}
    level = noise_level(call.kwargs) if level is None else float(level)
    return Descriptor(level, statistics, unit is not None and held_out(unit))


def floats_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the path and the tensor for each floating-point tensor in `value`, a tensor or nested dicts, lists and
    tuples. The path is `path`, followed by a dot and the key or index for each level of nesting, such as
    ".1.hidden_states"."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in pairs:
        yield from floats_in(part, f"{path}.{key}")


def statistics_of(x: Tensor) -> Tensor:
    """Returns the minimum, maximum and mean square of each group of neighbouring channels of `x`, (3, groups) float64;
    there are at most 64 groups.

    Channels are the last axis of tensors with up to three axes, otherwise the second axis, as in images and videos.
    Values that are not finite count as 0, because the replay reports them.
    """
    channels = x.ndim - 1 if x.ndim <= 3 else 1
    rows = x.detach().to(torch.float32).nan_to_num(0.0, 0.0, 0.0).reshape(x.shape or (1,))
    rows = rows.movedim(channels, -1).flatten(0, -2) if rows.ndim > 1 else rows[None]  # (rows, channels)
    low, high, square = rows.amin(0), rows.amax(0), rows.square().mean(0)
    size = -(-len(low) // _GROUPS)
    groups = torch.arange(-(-len(low) // size) * size, device=x.device).clamp(max=len(low) - 1).view(-1, size)
    return torch.stack([low[groups].amin(1), high[groups].amax(1), square[groups].mean(1)]).to("cpu", torch.float64)


def farthest(calls: Iterable[Call], wanted: int, ranks: Ranks = ALONE) -> list[int]:
    """Returns the positions of the `wanted` calls whose arguments differ most, in ascending order; all positions if
    there are no more than `wanted` calls.

    Only one call is in memory at a time. Held-out calls get a share of the positions in proportion to their number. If
    more than one call is wanted and there are held-out and other calls, at least one of each kind is picked.
    Collective: `ranks` share the reading of the calls.
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
    """Merges the descriptors of all ranks into the order of the calls. `parts` has a list for each rank, with the
    descriptors of its calls: of n ranks, rank i has the calls i, i + n, i + 2 n and so on."""
    return [descriptor for row in itertools.zip_longest(*parts) for descriptor in row if descriptor is not None]


def points_of(descriptors: Sequence[Descriptor]) -> Tensor:
    """Makes a point of each call: returns (calls, coordinates) float64. The coordinates are the noise level and the
    statistics in the call's descriptor. The coordinates of the noise level and those of each tensor are scaled to the
    same total variance, so that a tensor counts the same whatever its number of channels."""
    levels = torch.tensor(
        [[0.0 if descriptor.level is None else descriptor.level] for descriptor in descriptors], dtype=torch.float64
    )
    blocks = [levels]
    for path in dict.fromkeys(path for descriptor in descriptors for path in descriptor.statistics):
        tensors = [descriptor.statistics.get(path) for descriptor in descriptors]
        if len({len(x[0]) for x in tensors if x is not None}) > 1:  # calls differ in their groups: use one group
            tensors = [None if x is None else torch.stack([x[0].amin(), x[1].amax(), x[2].mean()]) for x in tensors]
        present = torch.tensor([x is not None for x in tensors])
        rows = torch.stack([x.flatten() for x in tensors if x is not None])
        block = rows.mean(0).repeat(len(tensors), 1)  # a call without this tensor gets the mean
        block[present] = rows
        blocks.append(block)
    return torch.cat([_scaled(block) for block in blocks], 1)


def _scaled(block: Tensor) -> Tensor:
    """Scales the columns of `block` (calls, columns) to mean 0 and to equal variances that add up to 1, and drops
    columns that do not vary. The columns of a block are the noise level of each call, or the statistics of one
    tensor."""
    centred = block - block.mean(0)
    deviation = centred.square().mean(0).sqrt()
    varies = deviation > _SAME * block.abs().amax(0)
    return centred[:, varies] / deviation[varies] / max(int(varies.sum()), 1) ** 0.5


def _traversed(points: Tensor, held_out: Tensor, remaining: dict[bool, int]) -> Iterator[int]:
    """Yields positions of `points` (calls, coordinates): first the point farthest from the origin, then each time the
    point farthest from all that were yielded; of equally far points the first. `held_out` says of each point whether
    its call is held out. Yields as many held-out points as `remaining[True]`, and as many other points as
    `remaining[False]`."""
    distance, nearest = points.square().sum(1), None
    while any(remaining.values()):
        allowed = torch.where(held_out, remaining[True] > 0, remaining[False] > 0)
        position = int(torch.where(allowed, distance, -2.0).argmax())
        yield position
        remaining[bool(held_out[position])] -= 1
        new_distance = (points - points[position]).square().sum(1)
        distance = nearest = new_distance if nearest is None else torch.minimum(nearest, new_distance)
        distance[position] = -1.0  # picked only once, even where all other points are equal to it
