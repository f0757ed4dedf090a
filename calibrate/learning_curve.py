"""The learning curve, which shows how many calls were enough: the output SQNR of the model with the choices that the
first 1, 2, 4, 8, ... prompts would have led to.

Prompts are counted in the order of the capture, as a shorter capture would have held them. Ranges and smoothing are
chosen anew from these calls; weights are rounded to the nearest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .choice import Choice, layer_of
from .choose import Chosen, extremes, nearest_choices, transforms_of
from .layers.inputs import StaticInput
from .layers.install import quantized
from .observers.survey import Survey
from .observers.survey_replay import merge_ranks
from .plan import FloatLayer, Plan, layer_at
from .replay.calls import Call
from .replay.marks import Mark, affordable
from .replay.sqnr import outputs, power_of
from .replay.work import Work
from .settings import Settings

NEAR = 0.1  # dB: an SQNR at most this far below the final one counts as equal
GROWING = 0.3  # dB: if the last doubling of calls gained more, further calls are expected to gain too
MOST_MARKS = 3  # snapshots that are measured: each takes its own search for smoothing


class LayerOnDemand(nn.Module):
    """An integer layer that is made for each call and freed afterwards: many choices take the memory of one layer."""

    def __init__(self, module: FloatLayer, choice: Choice) -> None:
        super().__init__()
        self.make = partial(layer_of, module, choice)
        self.input_type, self.noise_level = StaticInput, None

    def forward(self, input: Tensor) -> Tensor:
        """The output of the integer layer, or of the float layer where no integer layer can be made."""
        layer = self.make()
        return self.make.args[0](input) if isinstance(layer, str) else layer(input)


def learning_curve(
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    chosen: Chosen,
    calls: Callable[[], Iterable[Call]],
    exact: Sequence[Sequence[Tensor]],
    work: Work,
) -> list[dict[str, Any]]:
    """Measures rows {calls, prompts, output_sqnr in dB}, one for each snapshot: the float `model` with the layers of
    `plan` as the calls up to that snapshot would have chosen them.

    Measured on `calls`, for which the float model's outputs were `exact`. Where all weights are rounded to the nearest
    the last row, for all calls, is left out: it is that of the result. [] where measuring would cost too much, or where
    the choices for fewer calls are not known. Collective: the ranks of `work` share the calls, and `exact` holds this
    rank's outputs.
    """
    rows = []
    marked = earlier_choices(model, chosen, plan, settings, work)
    if settings.method.plain:
        marked.pop(chosen.seen.last, None)
    for mark, choices in work.progress("enough", marked.items(), len(marked)) if marked else ():
        names = [name for name in plan.quantized if name in choices]
        layers: dict[str, Any] = {name: LayerOnDemand(layer_at(model, name), choices[name]) for name in names}
        with quantized(model, layers):
            power = power_of(exact, outputs(model, calls(), work.ranks), work.ranks)
        if power.sqnr is not None:
            rows.append({**mark._asdict(), "output_sqnr": power.sqnr})
    return rows


def earlier_choices(
    model: nn.Module, chosen: Chosen, plan: Plan, settings: Settings, work: Work
) -> dict[Mark, dict[str, Choice]]:
    """The choices that the calls up to each snapshot worth measuring would have led to, and the choices of all calls.

    All choices have weights rounded to the nearest. Empty where choices need another replay: the result of fewer calls
    is not known then.
    """
    known = settings.input_type.rounded and not settings.fallback and chosen.timesteps is None
    if chosen.survey is not None:
        known = known and settings.observer == "minmax"
    marks = chosen.survey.at_marks if chosen.survey and chosen.survey.at_marks else chosen.seen.at_marks
    measured = settings.measured(chosen.seen.calls) if known else 0
    found = {
        mark: _choices_at(mark, model, chosen, plan, settings, work)
        for mark in affordable(marks, chosen.seen.calls, measured)[-MOST_MARKS:]
    }
    return found | {chosen.seen.last: chosen.nearest} if found else {}


def _choices_at(
    mark: Mark, model: nn.Module, chosen: Chosen, plan: Plan, settings: Settings, work: Work
) -> dict[str, Choice]:
    """The choices that follow from the observations at a snapshot."""
    surveys = dict[str, Survey]()
    if chosen.survey is not None and mark in chosen.survey.at_marks:
        surveys = merge_ranks(chosen.survey.at_marks[mark], work.ranks).surveys
    transforms = transforms_of(model, surveys, settings, work)
    ranges = chosen.seen.at_marks.get(mark, {}) | extremes(surveys, transforms)
    return nearest_choices(model, plan, settings, chosen.seen._replace(ranges=ranges), transforms)[0]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One line on whether fewer calls would have sufficed, or more would gain; None where that was not measured.

    The last row is for all calls. The last doubling starts at the last row with at most half of these calls.
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
