"""Finds ranges by a replay in which observers record layer inputs after smoothing, one for each bin of noise levels.

Bins divide the noise levels of the calls so that each bin has about as many calls; the bin of a level is the number of
edges not above the level. A level is the denoiser's time argument, so bins found in 28 steps serve 20 or 50.

A bin has few calls, and a range found from few calls clips values of others. So each bin of each layer has a range of
its own only where that pays on calls that the range was not found from, else the range of all bins, as a static input
has. The calls of a bin are divided into folds by prompt; the range that all folds but one give is judged on the
remaining one, for each fold in turn (cross-validation: Stone, Cross-Validatory Choice and Assessment of Statistical
Predictions, 1974). The observers hold each fold apart, so one replay suffices.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks

from ..layers.inputs import StaticInput, TimestepInput
from ..layers.noise_level import bins_of
from ..layers.scheme import QParams, Range, Scheme, exact_scale, qparams_of
from ..layers.transforms import Transform
from ..replay.calls import Call
from ..replay.current_call import CurrentCall
from ..replay.hooks import observe
from ..replay.snapshots import Snapshots
from .observers import OBSERVERS, Observer, Options

BINS = 8  # bins of noise levels, each with its own range (W8A8_TIMESTEP)
FOLDS = 4  # parts of a bin's calls: a range of three quarters is judged on the fourth, as held_out divides prompts
# weight of clipping: the share of a call's values that count as lying as far outside a range as the farthest, without
# and with smoothing. About 1 in 1,000 do; in a model that is smoothed less other error hides that of clipping
# (bench/bench_timesteps.py: with 1e-3 the bundled pipeline, smoothed, loses 0.7 dB with 32 calls)
_CLIPPED, _CLIPPED_SMOOTH = 1e-3, 1e-2


class Bins(NamedTuple):
    """The division of calls by noise level: `edges` between bins, (bins - 1,) float32 ascending, and the fold of each
    call by position."""

    edges: Tensor
    folds: Mapping[int, int] = {}


WHOLE = Bins(torch.zeros(0, dtype=torch.float32, device="cpu"))  # no edges between bins of noise levels: one bin
Ranges = dict[str, list[Range]]  # ranges of each layer's input by layer name, one for each bin of noise levels


def edges_of(levels: Iterable[float], bins: int = BINS) -> Tensor:
    """The edges between bins, (bins - 1,) float32 ascending, halfway between neighbouring levels; fewer where there are
    fewer levels."""
    different = sorted(set(levels))
    count = min(bins, len(different))
    starts = sorted({at * len(different) // count for at in range(1, count)})
    return torch.tensor([(different[at - 1] + different[at]) / 2 for at in starts], dtype=torch.float32)


def bins_for(levels: Mapping[int, float], units: Sequence[int | None]) -> Bins:
    """Divides calls by their noise `levels`, by position, and the calls of each bin into folds.

    Calls of the same prompt, the number in `units`, are in the same fold of a bin.
    """
    edges = edges_of(levels.values())
    folds, groups = {}, [dict[int, int]() for _ in range(len(edges) + 1)]
    for position in sorted(levels):
        unit, known = units[position], groups[int(bins_of(torch.tensor(levels[position]), edges))]
        folds[position] = known.setdefault(position if unit is None else unit, len(known) % FOLDS)
    return Bins(edges, folds)


class Binned:
    """Observers of one layer's transformed input, one for each fold of each bin of noise levels."""

    def __init__(
        self, observer: str, options: Options, current: CurrentCall, bins: Bins, transform: Transform | None
    ) -> None:
        kind = OBSERVERS[observer]
        folds = range(max(bins.folds.values(), default=0) + 1)
        self._observers: list[list[Observer]] = [[kind(options) for _ in folds] for _ in range(len(bins.edges) + 1)]
        self._current, self._bins, self._transform = current, bins, transform
        self.scheme = options.scheme
        self.key = (kind, None if transform is None else id(transform))

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """A function that reads the observers' statistics of an input after its transform."""
        read, transform = self._observers[0][0].read, self._transform
        return read if transform is None else lambda x: read(transform.input(x.detach()))

    def add(self, reading: Any) -> None:
        """Adds a reading at the noise level and the position of the current call."""
        level, edges = self._current.level, self._bins.edges
        at = 0 if level is None or not len(edges) else int(bins_of(torch.tensor(level), edges))
        self._observers[at][self._bins.folds.get(self._current.position, 0)].add(reading)

    @property
    def observers(self) -> list[list[Observer]]:
        """The observers of each bin, one for each fold."""
        return self._observers


def range_of(observers: Iterable[Observer]) -> Range | None:
    """The range that these observers give together; None without data. Changes none of them."""
    whole: Observer | None = None
    for observer in observers:
        if whole is None:
            whole = copy.deepcopy(observer)
        else:
            whole.merge(observer)
    try:
        return None if whole is None else whole.range()
    except ValueError:
        return None


def ranges_of(observers: Sequence[Sequence[Observer]], scheme: Scheme, share: float = _CLIPPED) -> list[Range]:
    """The range of each bin of one layer: that of its calls where this pays on other calls, else that of all bins.

    `observers` hold the folds of each bin. The error of a range is that of rounding, by its scale, and that of clipping
    a `share` of the values of a fold that it was not found from. A bin has few folds, so its clipping counts as no less
    than the mean over all bins. Raises ValueError when no bin has data.
    """
    static = range_of(itertools.chain(*observers))
    if static is None:
        raise ValueError("saw no data")
    if len(observers) == 1:
        return [static]
    folds = list(zip(*observers, strict=True))
    rest = [range_of(itertools.chain(*folds[:at], *folds[at + 1 :])) for at in range(len(folds))]
    most = _error(static, _mean([each for row in observers for each in _clipping(row, rest, scheme, share)]), scheme)
    others = [[range_of([*row[:at], *row[at + 1 :]]) for at in range(len(row))] for row in observers]
    clipped = [_clipping(*each, scheme, share) for each in zip(observers, others, strict=True)]
    everywhere = _mean([each for row in clipped for each in row if each < math.inf])
    ranges = []
    for row, each in zip(observers, clipped, strict=True):
        own = range_of(row) or static
        ranges.append(own if _error(own, max(everywhere, _mean(each)), scheme) < most else static)
    return ranges


def _error(found: Range, clipped: float, scheme: Scheme) -> float:
    """The squared error of codes for a range, in units of that of a scale of 1; `clipped` is that of clipping over that
    of rounding."""
    return (1.0 + clipped) * exact_scale(found, scheme) ** 2


def _clipping(folds: Sequence[Observer], others: Sequence[Range | None], scheme: Scheme, share: float) -> list[float]:
    """The squared error of clipping each fold that has data to the range that `others` found, over that of rounding.

    Infinite where no range was found.
    """
    errors = []
    for observer, found in zip(folds, others, strict=True):
        if (seen := range_of([observer])) is None:
            continue
        found = found or Range(0.0, 0.0)
        beyond = max(seen.high - max(found.high, 0.0), 0.0), max(min(found.low, 0.0) - seen.low, 0.0)
        scale, square = exact_scale(found, scheme), sum(each**2 for each in beyond)
        errors.append((12 * share * square / scale**2 if scale else math.inf) if square else 0.0)
    return errors


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def observe_ranges(
    model: nn.Module,
    names: Iterable[str],
    calls: Iterable[Call],
    observer: str,
    options: Options,
    transforms: Mapping[str, Transform],
    bins: Bins,
    ranks: Ranks = ALONE,
) -> tuple[Ranges, CurrentCall, Snapshots]:
    """Replays the calls; returns the ranges of the inputs of the layers that ran, one for each bin, the state of
    the calls, and snapshots of the ranges on the way.

    Collective: `ranks` share the calls, and all return the same ranges. Raises as `replay.hooks.observe` does.
    """
    current, share = CurrentCall(model, ranks), _CLIPPED_SMOOTH if transforms else _CLIPPED
    binned = {name: Binned(observer, options, current, bins, transforms.get(name)) for name in names}
    snapshots = Snapshots(lambda: observed(binned, ranks, share))
    observe(model, binned, current.tracked(snapshots.taking(calls)), ranks)
    return observed(binned, ranks, share), current.shared(), snapshots


def observed(binned: Mapping[str, Binned], ranks: Ranks, share: float = _CLIPPED) -> Ranges:
    """The ranges that the observers of all ranks found so far, of the layers that ran; `share` as in `ranges_of`.
    Collective."""
    first, *others = ranks.gather({name: each.observers for name, each in binned.items()})
    ranges = {}
    for name, observers in first.items():
        for other in others:
            for mine, its in zip(itertools.chain(*observers), itertools.chain(*other[name]), strict=True):
                mine.merge(its)
        try:
            ranges[name] = ranges_of(observers, binned[name].scheme, share)
        except ValueError:
            continue
    return ranges


def input_with(
    ranges: list[Range], edges: Tensor, scheme: Scheme, dtype: torch.dtype
) -> StaticInput | TimestepInput | None:
    """The input with these ranges, one for each bin of `edges`; None where `dtype` holds no scale for a range."""
    found = [qparams_of(each, scheme, dtype) for each in ranges]
    qparams = [each for each in found if each is not None]
    if len(qparams) < len(ranges):
        return None
    if not len(edges):
        return StaticInput(qparams[0], scheme=scheme)
    scale, zero_point = (torch.stack(list(column)) for column in zip(*qparams, strict=True))
    return TimestepInput(QParams(scale, zero_point), edges, scheme=scheme)
