"""The learning curve: the model's output SQNR if only the first 1, 2, 4, 8, ... prompts had been captured.

The curve shows whether fewer calls would have been enough. The first prompts are those that come first in the capture.
For each number of prompts, ranges and smoothing factors are chosen from the calls of these prompts alone, and weights
are rounded to the nearest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .choice import Choice, layer_of
from .choose import Selection, extremes, nearest_choices, smoothings_of, widened
from .layers.inputs import StaticInput
from .layers.install import quantized
from .observers.survey import Survey
from .observers.survey_replay import merge_ranks
from .plan import FloatLayer, Plan, layer_at
from .replay.calls import Call
from .replay.snapshots import CallCount, affordable
from .replay.sqnr import outputs, power_of
from .replay.work import Work
from .settings import Settings

EQUAL_WITHIN = 0.1  # dB; an SQNR at most this far below the final one counts as equal to it
STILL_GAINING = 0.3  # dB; where doubling the calls last gained more than this, more calls are recommended
MAX_SNAPSHOTS = 3  # largest number of snapshots that are measured: each costs a search for smoothing factors


class LayerOnDemand(nn.Module):
    """A module that makes an integer layer anew in every forward and frees it afterwards. A model of such modules needs
    the memory of only one integer layer at a time."""

    def __init__(self, module: FloatLayer, choice: Choice) -> None:
        super().__init__()
        self.make = partial(layer_of, module, choice)
        self.input_type, self.noise_level = StaticInput, None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output of the integer layer for `input`; the output of the float layer if no integer layer can be
        made."""
        layer = self.make()
        return self.make.args[0](input) if isinstance(layer, str) else layer(input)


def learning_curve(
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    chosen: Selection,
    calls: Callable[[], Iterable[Call]],
    exact: Sequence[Sequence[Tensor]],
    work: Work,
) -> list[dict[str, Any]]:
    """Measures the output SQNR that fewer calibration calls would have given, and returns the rows of `enough` in
    report.json: {calls, prompts, output_sqnr in dB}.

    `chosen` holds snapshots: what was observed of the inputs after the first 1, 2, 4, ... prompts. Each of the latest
    snapshots, at most three, gives a row. For this row, choices are made from the snapshot, the layers of `plan` in
    `model` become integer layers with these choices, and the SQNR is measured on `calls`, whose float outputs are
    `exact`. The last row is for all calls, with weights rounded to the nearest. The caller adds this row if the
    calibration itself rounds weights to the nearest and corrects no biases. Returns [] if measuring would take too
    long, or if the snapshots lack what choices need, such as ranges for timestep bins.

    Collective: the ranks of `work` share the calls, and `exact` holds the outputs of this rank's calls.
    """
    rows = []
    choices_by_count = earlier_choices(model, chosen, plan, settings, work)
    if settings.method.plain:
        choices_by_count.pop(chosen.observations.last, None)
    items = choices_by_count.items()
    guarded = {row.name: chosen.choices[row.name] for row in chosen.guarded if row.scheme is not None}
    for count, choices in work.progress("learning curve", items, len(items)) if items else ():
        choices = {**choices, **guarded}
        names = [name for name in plan.quantized if name in choices]
        layers: dict[str, Any] = {name: LayerOnDemand(layer_at(model, name), choices[name]) for name in names}
        with quantized(model, layers):
            power = power_of(exact, outputs(model, calls(), work.ranks), work.ranks)
        if power.sqnr is not None:
            rows.append({**count._asdict(), "output_sqnr": power.sqnr})
    return rows


def earlier_choices(
    model: nn.Module, chosen: Selection, plan: Plan, settings: Settings, work: Work
) -> dict[CallCount, dict[str, Choice]]:
    """Returns the choices that fewer calibration calls would have given: a dict from CallCount, the numbers of calls
    and prompts, to a dict from layer name to choice. A snapshot holds what was observed in the first 1, 2, 4, ...
    prompts. The dict has an entry for each of the latest snapshots, at most three, and one for all calls with the
    choices of `chosen`. In all entries weights are rounded to the nearest. `work` holds the progress display and the
    ranks that take part.

    The dict is empty in four cases:

    - Measuring a snapshot would take too long.
    - The input stays float, so choices do not depend on the calls.
    - The layers that stay float are picked by their error on all calls (`settings.fallback`).
    - The snapshots do not hold all ranges. This is so with timestep bins, and with an observer other than "minmax" if
      the inputs were surveyed, for smoothing, rotation or a rounding method.
    """
    reusable = settings.input_type.rounded and not settings.fallback and chosen.timesteps is None
    if chosen.survey is not None:
        reusable = reusable and settings.observer == "minmax"
    snapshots = chosen.survey.snapshots if chosen.survey and chosen.survey.snapshots else chosen.observations.snapshots
    measured = settings.measured(chosen.observations.calls) if reusable else 0
    choices = {
        count: _choices_at(count, model, chosen, plan, settings, work)
        for count in affordable(snapshots, chosen.observations.calls, measured)[-MAX_SNAPSHOTS:]
    }
    return choices | {chosen.observations.last: chosen.nearest} if choices else {}


def _choices_at(
    count: CallCount, model: nn.Module, chosen: Selection, plan: Plan, settings: Settings, work: Work
) -> dict[str, Choice]:
    """Returns a dict from layer name to the choice that is made from the observations in the snapshot `count` of
    `chosen`: from the first `count.calls` calls alone. `work` holds the progress display and the ranks that take
    part."""
    surveys = dict[str, Survey]()
    if chosen.survey is not None and count in chosen.survey.snapshots:
        surveys = merge_ranks(chosen.survey.snapshots[count], work.ranks).surveys
    smoothings = smoothings_of(model, surveys, settings, work)
    transforms = {name: smoothing.transform for name, smoothing in smoothings.items()}
    observed = chosen.observations.snapshots.get(count, {}) | extremes(surveys, transforms)
    ranges = widened(observed, smoothings)
    return nearest_choices(model, plan, settings, chosen.observations._replace(ranges=ranges), transforms)[0]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a sentence for the user: whether more calls would help, or fewer would have been enough.

    `rows` is the learning curve. The last row, for all calls, is compared with the last row that has at most half as
    many prompts. Returns None for fewer than two rows.
    """
    if len(rows) < 2:
        return None
    last = rows[-1]
    half = next((row for row in reversed(rows) if 2 * _size(row) <= _size(last)), rows[0])
    gained = last["output_sqnr"] - half["output_sqnr"]
    if gained > STILL_GAINING:
        return f"More calls would help: {_gain(last, half, f'{gained:.1f}')}."
    enough = last
    for row in reversed(rows):
        if row["output_sqnr"] < last["output_sqnr"] - EQUAL_WITHIN:
            break
        enough = row
    if enough is last:
        return f"The last calls still helped: {_gain(last, half, f'{gained:.2f}')}."
    calls = "" if last["prompts"] is None else f" ({enough['calls']} of {last['calls']} calls)"
    count, verb = _size(enough), "was" if _size(enough) == 1 else "were"
    fact = f"output SQNR with the first {count} is within {EQUAL_WITHIN} dB of that with all"
    return f"{count} of {_counted(last)} {verb} enough{calls}: {fact}."


def _gain(last: Mapping[str, Any], half: Mapping[str, Any], decibels: str) -> str:
    return f"output SQNR with all {_counted(last)} is {decibels} dB higher than with the first {_size(half)}"


def _size(row: Mapping[str, Any]) -> int:
    """Returns the number of prompts of `row`, a row of the learning curve. If the calls do not name their prompts,
    returns the number of calls."""
    return int(row["calls"] if row["prompts"] is None else row["prompts"])


def _counted(row: Mapping[str, Any]) -> str:
    """Returns a text such as "8 prompts", or "224 calls" if the calls do not name their prompts, for a row of the
    learning curve."""
    return f"{_size(row)} {'calls' if row['prompts'] is None else 'prompts'}"
