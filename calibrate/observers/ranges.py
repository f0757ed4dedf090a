"""Computes the ranges of layer inputs, after smoothing, in one replay (a run of the float model on recorded calls),
separately for each timestep bin.

The bins are intervals of noise levels, separated by levels that are called edges. The edges are chosen so that all bins
have about the same number of different noise levels. A level that equals an edge is in the bin above that edge. A noise
level is the denoiser's time argument, so bins that were found in a run of 28 steps also apply to runs of 20 or 50
steps.

A bin has few calls, and a range computed from few calls clips values of other calls. So a bin of a layer gets a range
of its own only if that range lowers the error on calls that it was not computed from; otherwise the bin gets the range
of all bins, which is the static range. The calls of a bin are divided into cross-validation folds by prompt. For each
fold in turn, a range is computed from the other folds and judged on this fold (Stone, Cross-Validatory Choice and
Assessment of Statistical Predictions, 1974). Each fold has its own observers, so one replay suffices.
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
from ..plan import layer_at
from ..replay.calls import Call
from ..replay.current_call import CurrentCall, prompt_of
from ..replay.hooks import observe
from ..replay.snapshots import Snapshots
from .observers import OBSERVERS, Observer, Options

BINS = 8  # most timestep bins, each with its own range (W8A8_TIMESTEP)
FOLDS = 4  # folds of a bin's calls: ranges of three folds are judged on the fourth, as in the held-out split
# share of a call's values that are assumed to lie as far outside a range as the farthest value, without and with
# smoothing. About 1 in 1,000 do. A smoothed model has less other error that hides the clipping error
# (bench/bench_timesteps.py: with 1e-3 the bundled pipeline, smoothed, loses 0.7 dB with 32 calls)
_CLIPPED_SHARE, _CLIPPED_SHARE_SMOOTH = 1e-3, 1e-2


class Bins(NamedTuple):
    """Holds a division of calls into timestep bins. `edges` are the noise levels that separate the bins, (bins - 1,)
    float32 ascending. `folds` is a dict from the position of a call to the number of its cross-validation fold."""

    edges: Tensor
    folds: Mapping[int, int] = {}


ONE_BIN = Bins(torch.zeros(0, dtype=torch.float32, device="cpu"))  # no edges: one bin for all noise levels
Ranges = dict[str, list[Range]]  # ranges of each layer's input by layer name, one for each timestep bin


def edges_of(levels: Iterable[float], bins: int = BINS) -> Tensor:
    """Returns the edges, the noise levels that separate the timestep bins: (bins - 1,) float32 ascending. The different
    values of `levels` are sorted and cut into `bins` parts with about the same number of values, or into one part for
    each value if there are fewer values than `bins`. An edge lies halfway between the values on both sides of a cut."""
    distinct = sorted(set(levels))
    count = min(bins, len(distinct))
    starts = sorted({index * len(distinct) // count for index in range(1, count)})
    return torch.tensor([(distinct[index - 1] + distinct[index]) / 2 for index in starts], dtype=torch.float32)


def bins_for(levels: Mapping[int, float], units: Sequence[int | None]) -> Bins:
    """Divides calls into timestep bins, and the calls of each bin into cross-validation folds.

    `levels` is a dict from the position of a call to its noise level. `units` has the prompt number of each call (None:
    unknown); calls of the same prompt are in the same fold of a bin.
    """
    edges = edges_of(levels.values())
    folds, groups = {}, [dict[int, int]() for _ in range(len(edges) + 1)]
    for position in sorted(levels):
        unit, folds_by_unit = units[position], groups[int(bins_of(torch.tensor(levels[position]), edges))]
        folds[position] = folds_by_unit.setdefault(prompt_of(unit, position), len(folds_by_unit) % FOLDS)
    return Bins(edges, folds)


class BinnedObserver:
    """Observes one layer's input, to which `transform` is applied first (None: no transform). The channels of the input
    are along `axis`, a negative number.

    There is a separate observer for each cross-validation fold of each timestep bin. `observer` is the key of their
    class in OBSERVERS, and `options` are their options. `current` says which call is running, and `bins` to which bin
    and fold the call belongs.
    """

    def __init__(
        self, observer: str, options: Options, current: CurrentCall, bins: Bins, transform: Transform | None,
        axis: int = -1,
    ) -> None:  # fmt: skip
        kind = OBSERVERS[observer]
        folds = range(max(bins.folds.values(), default=0) + 1)
        self._observers: list[list[Observer]] = [[kind(options) for _ in folds] for _ in range(len(bins.edges) + 1)]
        self._current, self._bins, self._transform, self._axis = current, bins, transform, axis
        self.scheme = options.scheme
        self.key = (kind, None if transform is None else id(transform))

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """The function that applies the transform of the layer's input, if there is one, to a tensor, and returns the
        statistics that the observers need of the result."""
        read, transform, axis = self._observers[0][0].read, self._transform, self._axis
        return read if transform is None else lambda x: read(transform.input(x.detach(), axis))

    def add(self, reading: Any) -> None:
        """Adds `reading`, the statistics of one input, which the function `read` returned, to the observer for the
        timestep bin and the cross-validation fold of the current call."""
        level, edges = self._current.level, self._bins.edges
        index = 0 if level is None or not len(edges) else int(bins_of(torch.tensor(level), edges))
        self._observers[index][self._bins.folds.get(self._current.position, 0)].add(reading)

    @property
    def observers(self) -> list[list[Observer]]:
        """The observers: a list for each timestep bin, with one observer for each cross-validation fold."""
        return self._observers


def range_of(observers: Iterable[Observer]) -> Range | None:
    """Returns the range that a single observer would choose after all tensors that `observers` observed; None if they
    observed none. Changes none of `observers`."""
    total: Observer | None = None
    for observer in observers:
        if total is None:
            total = copy.deepcopy(observer)
        else:
            total.merge(observer)
    try:
        return None if total is None else total.range()
    except ValueError:
        return None


def ranges_of(observers: Sequence[Sequence[Observer]], scheme: Scheme, share: float = _CLIPPED_SHARE) -> list[Range]:
    """Returns the range of each timestep bin for one layer's input: the bin's own range if that has a smaller error on
    calls from which it was not computed, else the range over all bins.

    `observers` has a list for each bin, with one observer for each cross-validation fold of the calls. `scheme` is the
    rule by which the input becomes codes.

    The error of a range is an estimated squared error: that of rounding, scale**2 / 12, plus that of clipping. To
    estimate the clipping error of a fold, a range is computed from the other folds; the share `share` of the fold's
    values is assumed to lie as far outside this range as the farthest value of the fold. The clipping error of a bin is
    the mean over its folds. A bin has few folds, so its clipping error is taken to be at least the mean over the folds
    of all bins. Raises ValueError if nothing was observed.
    """
    static = range_of(itertools.chain(*observers))
    if static is None:
        raise ValueError("no input was observed")
    if len(observers) == 1:
        return [static]
    folds = list(zip(*observers, strict=True))
    rest = [range_of(itertools.chain(*folds[:index], *folds[index + 1 :])) for index in range(len(folds))]
    clipped_static = [value for row in observers for value in _clipping(row, rest, scheme, share)]
    static_error = _error(static, _mean(clipped_static), scheme)
    others = [[range_of([*row[:index], *row[index + 1 :]]) for index in range(len(row))] for row in observers]
    clipped = [_clipping(row, ranges, scheme, share) for row, ranges in zip(observers, others, strict=True)]
    mean_clipping = _mean([value for values in clipped for value in values if value < math.inf])
    chosen = []
    for row, values in zip(observers, clipped, strict=True):
        own = range_of(row) or static
        pays = _error(own, max(mean_clipping, _mean(values)), scheme) < static_error
        chosen.append(own if pays else static)
    return chosen


def _error(extent: Range, clipped: float, scheme: Scheme) -> float:
    """Returns 12 times the squared error that codes with the range `extent` have by the rule `scheme`. The squared
    error is that of rounding, scale**2 / 12, plus that of clipping; `clipped` is the clipping error divided by the
    rounding error."""
    return (1.0 + clipped) * exact_scale(extent, scheme) ** 2


def _clipping(folds: Sequence[Observer], extents: Sequence[Range | None], scheme: Scheme, share: float) -> list[float]:
    # for each fold that observed values: the squared clipping error of its range, as `ranges_of` estimates it, divided
    # by the squared rounding error, scale**2 / 12
    errors = []
    for observer, extent in zip(folds, extents, strict=True):
        if (full := range_of([observer])) is None:
            continue
        extent = extent or Range(0.0, 0.0)
        distances = max(full.high - max(extent.high, 0.0), 0.0), max(min(extent.low, 0.0) - full.low, 0.0)
        scale, square = exact_scale(extent, scheme), sum(distance**2 for distance in distances)
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
    """Runs the float model on `calls` and computes ranges for the inputs of the layers `names`, one for each timestep
    bin of `bins`.

    `observer` is a key of OBSERVERS, `options` are the options of the observers; `transforms` is a dict from layer name
    to the smoothing of its input. Returns a dict from the name of each layer that ran to its ranges, a CurrentCall with
    the noise levels and prompt numbers of all calls, and snapshots of the ranges after the first 1, 2, 4, ... prompts.
    Collective: every rank calls this, `ranks` share the calls, and all ranks return the same.

    Raises MisfitError for a call that does not fit the model, and if there are no calls; NumbersError for an input that
    is not finite; DeviceError when memory runs out.
    """
    current, share = CurrentCall(model, ranks), _CLIPPED_SHARE_SMOOTH if transforms else _CLIPPED_SHARE
    axes = {name: -3 if isinstance(layer_at(model, name), nn.Conv2d) else -1 for name in names}
    observers = {
        name: BinnedObserver(observer, options, current, bins, transforms.get(name), axis)
        for name, axis in axes.items()
    }
    snapshots = Snapshots(lambda: gather_ranges(observers, ranks, share))
    observe(model, observers, current.tracked(snapshots.taking(calls)), ranks)
    return gather_ranges(observers, ranks, share), current.shared(), snapshots


def gather_ranges(observers: Mapping[str, BinnedObserver], ranks: Ranks, share: float = _CLIPPED_SHARE) -> Ranges:
    """Returns a dict from layer name to the ranges, one for each timestep bin, that follow from what the observers of
    all ranks have observed so far. Layers that did not run are left out. `share` is the share of values that are
    assumed to be clipped when a bin's own range is judged. Collective: every rank calls this."""
    first, *other_ranks = ranks.gather({name: binned.observers for name, binned in observers.items()})
    ranges = {}
    for name, bins in first.items():
        for rank_bins in other_ranks:
            for mine, theirs in zip(itertools.chain(*bins), itertools.chain(*rank_bins[name]), strict=True):
                mine.merge(theirs)
        try:
            ranges[name] = ranges_of(bins, observers[name].scheme, share)
        except ValueError:
            continue
    return ranges


def input_with(
    ranges: list[Range], edges: Tensor, scheme: Scheme, dtype: torch.dtype
) -> StaticInput | TimestepInput | None:
    """Returns the rule by which the input of a layer becomes codes: a StaticInput with the only range if `edges` is
    empty, else a TimestepInput with a range for each of the bins that `edges` separate. `scheme` says which numbers are
    codes; `dtype` stores the scales. Returns None if one or more ranges have a scale that `dtype` cannot hold."""
    parameters = [qparams_of(extent, scheme, dtype) for extent in ranges]
    qparams = [extent for extent in parameters if extent is not None]
    if len(qparams) < len(ranges):
        return None
    if not len(edges):
        return StaticInput(qparams[0], scheme=scheme)
    scale, zero_point = (torch.stack(list(column)) for column in zip(*qparams, strict=True))
    return TimestepInput(QParams(scale, zero_point), edges, scheme=scheme)
