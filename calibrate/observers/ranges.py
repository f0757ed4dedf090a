"""Finds ranges by a replay in which observers record layer inputs after smoothing, one for each bin of noise levels.

Bins divide the noise levels of the calls so that each bin has about as many calls; the bin of a level is the number of
edges not above the level. A level is the denoiser's time argument, so bins found in 28 steps serve 20 or 50.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks

from ..layers.inputs import StaticInput, TimestepInput
from ..layers.noise_level import bins_of
from ..layers.scheme import QParams, Range, Scheme, qparams_of
from ..layers.transforms import Transform
from ..replay.calls import Call
from ..replay.current_call import CurrentCall
from ..replay.hooks import observe
from ..replay.marks import Marks
from .observers import OBSERVERS, Observer, Options

BINS = 8  # bins of noise levels, each with its own range (W8A8_TIMESTEP)
WHOLE = torch.zeros(0, dtype=torch.float32, device="cpu")  # no edges between bins of noise levels: one bin
Ranges = dict[str, list[Range]]  # ranges of each layer's input by layer name, one for each bin of noise levels


def edges_of(levels: Iterable[float], bins: int = BINS) -> Tensor:
    """The edges between bins, (bins - 1,) float32 ascending, halfway between neighbouring levels; fewer where there are
    fewer levels."""
    different = sorted(set(levels))
    count = min(bins, len(different))
    starts = sorted({at * len(different) // count for at in range(1, count)})
    return torch.tensor([(different[at - 1] + different[at]) / 2 for at in starts], dtype=torch.float32)


class Binned:
    """Observers of one layer's transformed input, one for each bin of noise levels."""

    def __init__(
        self, observer: str, options: Options, current: CurrentCall, edges: Tensor, transform: Transform | None
    ) -> None:
        kind = OBSERVERS[observer]
        self._observers: list[Observer] = [kind(options) for _ in range(len(edges) + 1)]
        self._current, self._edges, self._transform = current, edges, transform
        self.key = (kind, None if transform is None else id(transform))

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """A function that reads the observers' statistics of an input after its transform."""
        read, transform = self._observers[0].read, self._transform
        return read if transform is None else lambda x: read(transform.input(x.detach()))

    def add(self, reading: Any) -> None:
        """Adds a reading at the noise level of the current call."""
        level = self._current.level
        at = 0 if level is None or not len(self._edges) else int(bins_of(torch.tensor(level), self._edges))
        self._observers[at].add(reading)

    @property
    def observers(self) -> list[Observer]:
        """The observer of each bin."""
        return self._observers


def ranges_of(observers: Sequence[Observer]) -> list[Range]:
    """The range of each bin of one layer; a bin without data gets the range of all. Raises ValueError when no bin has
    data."""
    ranges: list[Range | None] = []
    for observer in observers:
        try:
            ranges.append(observer.range())
        except ValueError:
            ranges.append(None)
    seen = [each for each in ranges if each is not None]
    if not seen:
        raise ValueError("saw no data")
    whole = Range(min(each.low for each in seen), max(each.high for each in seen))
    return [each or whole for each in ranges]


def observe_ranges(
    model: nn.Module,
    names: Iterable[str],
    calls: Iterable[Call],
    observer: str,
    options: Options,
    transforms: Mapping[str, Transform],
    edges: Tensor,
    ranks: Ranks = ALONE,
) -> tuple[Ranges, CurrentCall, Marks]:
    """Replays the calls; returns the ranges of the inputs of the layers that ran, one for each bin of `edges`, the
    state of the calls, and snapshots of the ranges on the way.

    Collective: `ranks` share the calls, and all return the same ranges. Raises as `replay.hooks.observe` does.
    """
    current = CurrentCall(model, ranks)
    binned = {name: Binned(observer, options, current, edges, transforms.get(name)) for name in names}
    marks = Marks(lambda: observed(binned, ranks))
    observe(model, binned, current.each(marks.each(calls)), ranks)
    return observed(binned, ranks), current, marks


def observed(binned: Mapping[str, Binned], ranks: Ranks) -> Ranges:
    """The ranges that the observers of all ranks found so far, of the layers that ran. Collective."""
    first, *others = ranks.gather({name: each.observers for name, each in binned.items()})
    ranges = {}
    for name, observers in first.items():
        for other in others:
            for observer, its in zip(observers, other[name], strict=True):
                observer.merge(its)
        try:
            ranges[name] = ranges_of(observers)
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
