"""Guards layers against a scheme that would lose them.

FP8 codes have three bits of mantissa, so a layer whose values they can hold keeps an SQNR of about 30 dB. But codes
below 2**-6 lose these bits, and those below 2**-10 become zero. If the largest value of an input is far above all
others, and all share one scale, the codes of the others are that small.

A layer is lost if one of two errors is above LOST: its relative squared error on all held-out rows, or the median of
the errors of single rows. The median is needed because one large token, which keeps its precision, can outweigh all
others in the first error, and so hide that they became zero. A lost layer gets, of the schemes that are allowed, the
one with the smallest error, or stays float if that error is still above LOST.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .byte_sizes import size
from .choice import Choice
from .layers.inputs import INPUTS
from .layers.schemes import Instead
from .layers.transforms import Multiply, MultiplyRotate, Rotate, Transform
from .observers.survey import Survey
from .plan import FloatLayer, Plan, layer_at
from .replay.work import Work
from .rounding.judge import relative_error, row_errors
from .settings import Settings

LOST = 0.01  # relative squared error of a lost layer: 20 dB, a third of what FP8 codes leave where they fit


class Guarded(NamedTuple):
    """Says what the guard did about a lost layer.

    `error` is the relative squared error of the layer's output on held-out rows, in the scheme of the calibration, or
    the median of the errors of single rows if that is larger. `scheme` and `rotation` (channels in a group; 0: none)
    are what the layer got instead, and `left` is its error with them. If the layer stays float, `scheme` is None and
    `left` infinity.
    """

    name: str
    error: float
    scheme: str | None
    rotation: int
    left: float

    @property
    def reported(self) -> dict[str, object]:
        """The entry of the layer in the list `guard` of report.json: a dict with the errors as SQNR in dB."""
        return {
            "name": self.name, "sqnr": decibels(self.error), "scheme": self.scheme, "rotation": self.rotation or None,
            "sqnr_after": None if self.scheme is None else decibels(self.left),
        }  # fmt: skip


def decibels(error: float) -> float | None:
    """Returns the SQNR, in dB, of a relative squared error; None if the error is 0 or infinite."""
    return round(-10 * math.log10(error), 2) if 0.0 < error < math.inf else None


def guarded(
    model: nn.Module, choices: Mapping[str, Choice], surveys: Mapping[str, Survey], settings: Settings, work: Work
) -> tuple[dict[str, Choice], list[Guarded]]:
    """Returns `choices`, a dict from layer name to choice, in which lost layers have other schemes, and what was done
    about each lost layer. Layers that stay float are left out of the dict.

    Layers of one module that have the same input, such as to_q, to_k and to_v, get the same scheme: some consumers fuse
    them. `surveys` have held-out rows of the layers' inputs. Collective: the ranks of `work` share the layers.
    """
    if not settings.guarding:
        return dict(choices), []
    groups: dict[tuple[str, str], list[str]] = {}
    for name in choices:
        if name in surveys and surveys[name].has_input:
            groups.setdefault((name.rpartition(".")[0], surveys[name].leader), []).append(name)
    changed: dict[str, Choice] = {}
    rows: list[Guarded] = []
    shared = work.ranks.share(list(groups.values()))
    with work.watch.stage("guard"):
        for names in work.progress("guard", shared, len(shared)):
            new, lost = _for_group(model, names, choices, surveys, settings)
            changed |= new
            rows += lost
    parts = work.ranks.gather((changed, rows))
    changed = {name: choice for part, _ in parts for name, choice in part.items()}
    rows = [row for _, part in parts for row in part]
    floats = {row.name for row in rows if row.scheme is None}
    return {name: changed.get(name, choice) for name, choice in choices.items() if name not in floats}, rows


def _for_group(
    model: nn.Module,
    names: Sequence[str],
    choices: Mapping[str, Choice],
    surveys: Mapping[str, Survey],
    settings: Settings,
) -> tuple[dict[str, Choice], list[Guarded]]:
    """Returns the new choices of the layers `names`, and a row for each; both empty if none of them is lost."""

    def error(name: str, choice: Choice) -> float:
        return _error(layer_at(model, name), choice, surveys[name])

    before = {name: error(name, choices[name]) for name in names}
    if max(before.values()) <= LOST:
        return {}, []
    best: tuple[float, Instead, dict[str, Choice], dict[str, float]] | None = None
    for way in settings.instead:
        modules = {name: layer_at(model, name) for name in names}
        tried = {name: _choice(choices[name], modules[name], way, settings) for name in names}
        left = {name: error(name, choice) for name, choice in tried.items()}
        if max(left.values()) <= LOST and (best is None or sum(left.values()) < best[0]):
            best = sum(left.values()), way, tried, left
    if best is None:
        return {}, [Guarded(name, before[name], None, 0, math.inf) for name in names]
    _, way, tried, left = best
    return tried, [Guarded(name, before[name], way.scheme, way.rotation, left[name]) for name in names]


def _error(module: FloatLayer, choice: Choice, survey: Survey) -> float:
    """Returns the relative squared error of the output of the layer that `choice` makes of `module`, on the held-out
    rows in `survey`: over all rows, or the median over single rows if that is larger. Returns infinity if `choice`
    gives no layer."""
    rows = row_errors(module, choice, survey.judge_sample)
    if rows is None:
        return math.inf
    signal, noise = rows
    single = float((noise / torch.where(signal > 0, signal, 1.0)).median()) if len(signal) else 0.0
    return max(relative_error(signal, noise), single)


def _choice(choice: Choice, module: FloatLayer, way: Instead, settings: Settings) -> Choice:
    """Returns `choice` for the float layer `module` with the scheme and the rotation of `way`. A new rotation changes
    the weight, whose codes are then those of rounding to the nearest."""
    input = INPUTS[way.scheme].of({}, settings.input_scheme)
    fits = isinstance(module, nn.Linear) and way.rotation and module.in_features % way.rotation == 0
    if not fits:
        return replace(choice, input=input)
    transform: Transform = Rotate.by(way.rotation)
    if isinstance(choice.transform, (Multiply, MultiplyRotate)):
        factors = choice.transform if isinstance(choice.transform, Multiply) else choice.transform.multiply
        transform = MultiplyRotate(factors, Rotate.by(way.rotation))
    return Choice(input, transform)


def lost_layers(rows: Sequence[Guarded], settings: Settings) -> dict[str, str]:
    """Returns the layers that stay float because their scheme would lose them: a dict from layer name to reason."""
    return {row.name: f"{settings.scheme} would lose it" for row in rows if row.scheme is None}


def warning_of(rows: Sequence[Guarded], plan: Plan, settings: Settings) -> str | None:
    """Returns one line that says which layers of `plan` would have been lost, what was done, and what that costs; None
    if no layer is lost."""
    if not rows:
        return None
    worst = max(rows, key=lambda row: row.error)
    count = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
    level = "no" if (worst_level := decibels(worst.error)) is None else f"{worst_level:.1f}"
    line = f"{settings.scheme} would lose {count} on held-out calls (worst: {worst.name}, {level} dB)"
    parts = []
    if token := [row for row in rows if row.scheme is not None]:
        rotated = sum(row.rotation > 0 for row in token)
        least = min(filter(None, (decibels(row.left) for row in token)), default=0.0)
        more = f", {rotated} of them rotated" if rotated else ""
        parts.append(f"{len(token)} got a scale for each token instead{more}: at least {least:.1f} dB, slower to run")
    if floats := {row.name for row in rows if row.scheme is None}:
        kept = sum(entry.bytes for entry in plan.entries if entry.name in floats)
        parts.append(f"{len(floats)} stayed float: {size(kept)} instead of about half")
    return f"{line}. {'; '.join(parts)}."
