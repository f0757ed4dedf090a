"""How many calls were enough: the model's output with what the first 1, 2, 4, 8, ... prompts would have chosen.

Prompts are counted in the order they came: it is what a shorter capture would have held. Ranges and smoothing are
chosen anew from those calls; weights are rounded to the nearest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks

from .calls import Call, Progress
from .choice import Choice, layer_of
from .layers import quantized
from .plan import FloatLayer, layer_at
from .sqnr import Power, joined, outputs

NEAR = 0.1  # dB below the final SQNR: as good
GROWING = 0.3  # dB gained by the last doubling: more calls would gain too
_SHARE = 10  # of the replay's calls, one in so many is run again for this


class Mark(NamedTuple):
    """How far a replay was: after so many calls of so many prompts (None where calls do not say)."""

    calls: int
    prompts: int | None


class Marks:
    """Calls `take` after 1, 2, 4, 8, ... prompts of a replay, and holds what it returned; `last` is its end."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take
        self.taken: dict[Mark, Any] = {}
        self.last = Mark(0, None)

    def each(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls; when the next one is asked for, the one before was heard."""
        units: set[int] = set()
        for count, call in enumerate(calls):
            unit = getattr(call, "unit", None)
            done = count if unit is None else len(units)
            if done and done & (done - 1) == 0 and (unit is None or unit not in units):
                self.taken[self.last] = self._take()
            units |= set() if unit is None else {unit}
            self.last = Mark(count + 1, len(units) or None)
            yield call


def affordable(marks: Iterable[Mark], count: int, measured: int) -> list[Mark]:
    """The latest of the marks that can be measured with `measured` calls each, and all calls once more, for about a
    tenth of a replay of `count` calls; none where that is too little."""
    able = count // (_SHARE * measured) - 1 if measured else 0
    return sorted(marks)[-able:] if able > 0 else []


class Made(nn.Module):
    """An integer layer that is made for each call and let go: many choices take the memory of one layer."""

    def __init__(self, module: FloatLayer, choice: Choice) -> None:
        super().__init__()
        self.make = partial(layer_of, module, choice)
        self.scheme, self.noise_level = "W8A8", None

    def forward(self, input: Tensor) -> Tensor:
        """That of the integer layer; of the float one, where there is none."""
        made = self.make()
        return self.make.args[0](input) if isinstance(made, str) else made(input)


def curve(
    model: nn.Module,
    names: Iterable[str],
    marked: Mapping[Mark, Mapping[str, Choice]],
    calls: Callable[[], Iterable[Call]],
    exact: Sequence[Sequence[Tensor]],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Rows {calls, prompts, output_sqnr in dB} of the marks: of the float `model` with the layers `names` as chosen
    there (float where nothing was), on `calls`, for which the float model's outputs were `exact`. Collective: `ranks`
    share the calls, and `exact` is of this one's."""
    rows = []
    for mark, choices in progress("enough", marked.items(), len(marked)) if marked else ():
        layers: dict[str, Any] = {n: Made(layer_at(model, n), choices[n]) for n in names if n in choices}
        with quantized(model, layers):
            power = power_of(exact, outputs(model, calls(), ranks), ranks)
        if power.sqnr is not None:
            rows.append({**mark._asdict(), "output_sqnr": power.sqnr})
    return rows


def power_of(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]], ranks: Ranks = ALONE) -> Power:
    """That of a model's outputs on the same calls, which `ranks` share. Collective."""
    power = Power()
    for one, two in zip(exact, other, strict=True):
        for exact_tensor, tensor in zip(one, two, strict=True):
            power.add(exact_tensor, tensor)
    return joined({"": power}, ranks)[""]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One line on whether fewer calls would have done, or more would gain; None where it was not measured.

    The last row is of all calls. A doubling is from the last row of at most half of them.
    """
    if len(rows) < 2:
        return None
    last = rows[-1]
    half = next((row for row in reversed(rows) if 2 * _size(row) <= _size(last)), rows[0])
    gained = last["output_sqnr"] - half["output_sqnr"]
    if gained > GROWING:
        return f"More calls would gain: {_of(last)} have {gained:.1f} dB more output SQNR than the first {_size(half)}."
    enough = last
    for row in reversed(rows):
        if row["output_sqnr"] < last["output_sqnr"] - NEAR:
            break
        enough = row
    if enough is last:
        return f"The last calls still counted: {_of(last)} have {gained:.2f} dB more than the first {_size(half)}."
    found = f"{_size(enough)} of {_of(last)} were enough"
    calls = "" if last["prompts"] is None else f" ({enough['calls']} of {last['calls']} calls)"
    return f"{found}{calls}: output SQNR within {NEAR} dB of that with all."


def _size(row: Mapping[str, Any]) -> int:
    return int(row["calls"] if row["prompts"] is None else row["prompts"])


def _of(row: Mapping[str, Any]) -> str:
    return f"{_size(row)} {'calls' if row['prompts'] is None else 'prompts'}"
