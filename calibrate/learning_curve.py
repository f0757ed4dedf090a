"""How many calls were enough: the model's output with what the first 1, 2, 4, 8, ... prompts would have chosen.

Prompts are counted in the order they came: it is what a shorter capture would have held. Ranges and smoothing are
chosen anew from those calls; weights are rounded to the nearest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks

from .choice import Choice, layer_of
from .layers.install import quantized
from .plan import FloatLayer, layer_at
from .replay.calls import Call, Progress
from .replay.marks import Mark
from .replay.sqnr import outputs, power_of

NEAR = 0.1  # dB below the final SQNR: as good
GROWING = 0.3  # dB gained by the last doubling: more calls would gain too


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
