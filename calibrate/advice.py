"""Advises which layers to leave float, and measures by how much the model's output then becomes more accurate.

A backward pass estimates the share of each layer in the squared error of the model's output (output_shares.py). Then
the layers with the largest shares are left float, and held-out calls run once more. So the gain in the output SQNR is
measured and not estimated. A calibration that is run again with these layers in `--keep-float` has about this gain. It
may choose some things differently, such as the smoothing factors that these layers shared with others.
"""

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from octavo.capture.progress import size

from .layers.install import all_names, quantized, swapped
from .layers.modules import QuantizedLayer
from .part import Part, without_multipliers
from .plan import Plan, block_names, layer_at, matches
from .replay.calls import evenly_spaced
from .replay.output_shares import SAVED, output_shares
from .replay.sqnr import Power, outputs, powers_of, total
from .replay.work import Work
from .report_file import calls_text
from .settings import Settings

MIN_GAIN = 0.5  # dB; advice that brings less is not given
MIN_CALLS = 12  # with fewer calls, measuring the advice would take more than about a tenth of the calibration
_MOST = 5  # most layers that are named one by one
_WORTH = 1.0  # dB; if single layers bring less by estimate, all layers of a kind are considered too
_PER_CALL = 24, 64  # calls of the calibration for each call of measuring the gain, and of estimating the shares
_FEWEST, _MOST_ESTIMATED = 3, 4  # calls at least for measuring the gain, and calls at most for estimating the shares


class Trial(NamedTuple):
    """Layers whose gain is to be measured when they stay float. `patterns`: the values of --keep-float that name these
    layers. `names`: the names of all layers that would stay float with these values, one name for each layer. `floats`:
    a dict from name to float layer for the same layers; a layer that is used in several places has an entry for each of
    its names. `calls`: the calls that the gain is measured on, as positions in the list of measured calls. `held_out`:
    whether these calls are held out."""

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    floats: Mapping[str, nn.Module]
    calls: tuple[int, ...]
    held_out: bool


def find(
    model: nn.Module, part: Part, plan: Plan, settings: Settings, work: Work
) -> tuple[dict[str, float], Trial | None]:
    """Returns two things: a dict from the name of each layer of `plan` to the layer's estimated share in the error of
    the output of `model`; and the trial of the layers with the largest shares, None if leaving layers float would gain
    less than 0.5 dB by estimate. `model` has its float layers; `part` has the measured calls, and how each layer is
    quantized.

    Returns {} and None without an estimate if there are fewer than 12 calls, or if the settings themselves pick float
    layers (by --budget, for example).

    Collective: the ranks of `work` share the calls.
    """
    count = part.selection.observations.calls
    if count < MIN_CALLS or not part.positions or settings.fallback or settings.budget is not None:
        return {}, None
    indices, held_out = part.selection.observations.current.held_out_or_all(part.positions)
    calls = [indices[i] for i in evenly_spaced(len(indices), max(_FEWEST, count // _PER_CALL[0]))]
    estimated = evenly_spaced(len(calls), min(_MOST_ESTIMATED, max(1, count // _PER_CALL[1])))
    shares = _shares(model, part, plan, {calls[i] for i in estimated}, work)
    names = _candidate(shares, block_names(model))
    fewer = plan.kept_float(dict.fromkeys(names, "tried"))
    if settings.only_float is not None:
        fewer = fewer.kept_float(settings.only_float(model, fewer.quantized))
    fewer = without_multipliers(model, fewer, part.choices, settings)
    if not names or not fewer.quantized:
        return shares, None
    left = tuple(name for name in plan.quantized if name not in fewer.quantized)
    floats = all_names({name: layer_at(model, name) for name in left}, model)
    return shares, Trial(patterns_of(names, plan), left, floats, tuple(calls), held_out)


def _shares(model: nn.Module, part: Part, plan: Plan, indices: Collection[int], work: Work) -> dict[str, float]:
    """Returns a dict from layer name to the layer's mean share in the output's error over the measured calls with these
    `indices`; {} if the shares cannot be estimated. Collective: every rank calls this."""
    makers = {name: part.makers[name] for name in plan.quantized}
    limit = max(SAVED, sum(entry.bytes for entry in plan.entries))
    exact = dict(zip(_owned(part, work), part.exact, strict=True))
    mine = {
        index: output_shares(model, makers, call, exact[index], limit)
        for index, call in enumerate(islice(part.measured(), max(indices) + 1))
        if index in indices and index in exact
    }
    by_call = {index: shares for gathered in work.ranks.gather(mine) for index, shares in gathered.items()}
    known = [shares for _, shares in sorted(by_call.items()) if shares]
    return {name: math.fsum(shares[name] for shares in known) / len(known) for name in makers} if known else {}


def _candidate(shares: Mapping[str, float], blocks: Sequence[str]) -> list[str]:
    """Returns the names of the layers to leave float in a trial. `shares` is a dict from layer name to the layer's
    share in the output's error.

    First considers the layers with the largest shares: the fewest that together have half of the error, but at most
    five. If they gain less than 1 dB by estimate, also considers all layers of one kind, for each kind. Layers are of
    one kind if they have the same name inside their block, such as ff.net.2; `blocks` are the names of the blocks.
    Takes no more than a quarter of the layers, except a single one. Returns the layers with the largest estimated gain,
    [] if it is below 0.5 dB.
    """
    most = len(shares) // 4  # leaving more layers float is no longer a quantized model
    order = sorted(shares, key=lambda name: (-shares[name], name))
    few = order[: min(_MOST, max(1, most))]
    while len(few) > 1 and sum(shares[name] for name in few[:-1]) >= 0.5:
        few.pop()
    kinds: dict[str, list[str]] = {}
    for name in shares:
        block = next((block for block in blocks if name.startswith(block + ".")), None)
        if block is not None:
            kinds.setdefault(name.removeprefix(block), []).append(name)
    sets = [few] if len(few) < len(shares) else []
    if not sets or _estimate(shares, few) < _WORTH:
        sets += [names for names in kinds.values() if len(names) <= most]
    best = max(sets, key=lambda names: _estimate(shares, names), default=[])
    return best if best and _estimate(shares, best) >= MIN_GAIN else []


def _estimate(shares: Mapping[str, float], names: Sequence[str]) -> float:
    """Returns the estimated gain in output SQNR, in dB, of leaving the layers `names` float. `shares` is a dict from
    layer name to the layer's share in the squared error of the output, where all layers together have 1."""
    left = 1.0 - sum(shares[name] for name in names)
    return -10.0 * math.log10(left) if left > 0.0 else math.inf


def patterns_of(names: Collection[str], plan: Plan) -> tuple[str, ...]:
    """Returns patterns for --keep-float that match the layers `names` and no other quantized layer of `plan`: as few as
    can be found greedily, each as short as it can be. A pattern is a layer's name, or * and the end of the name."""
    others = [name for name in plan.quantized if name not in names]
    covered: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for pattern in (name, *("*." + ".".join(parts[start:]) for start in range(1, len(parts)))):
            if not any(matches(other, pattern) for other in others):
                covered[pattern] = {layer for layer in names if matches(layer, pattern)}
    chosen, left = [], set(names)
    while left:
        best = max(covered, key=lambda pattern: (len(covered[pattern] & left), -len(pattern), pattern))
        chosen.append(best)
        left -= covered[best]
    return tuple(chosen)


class Tried(NamedTuple):
    """The result of a `trial`. `power`: signal and noise of the output over all calls of the trial, with its layers in
    float. `order`: the positions of the measured calls of all ranks, rank after rank."""

    trial: Trial
    power: Power
    order: list[int]


def measure(model: nn.Module, layers: Mapping[str, QuantizedLayer], part: Part, trial: Trial, work: Work) -> Tried:
    """Runs `model` on the calls of the `trial`, with the layers of the trial in float and all others in 8 bits, and
    returns the measured error. `layers` is a dict from name to 8-bit layer for the layers to put into `model`, empty if
    `model` has its 8-bit layers already. Collective: every rank calls this."""
    mine = _owned(part, work)
    exact = [tensors for index, tensors in zip(mine, part.exact, strict=True) if index in trial.calls]
    calls = (call for index, call in enumerate(part.measured()) if index in trial.calls and index in mine)
    with quantized(model, layers), swapped(model, trial.floats):
        power = total(powers_of(exact, outputs(model, calls), work.ranks))
    return Tried(trial, power, [index for gathered in work.ranks.gather(mine) for index in gathered])


def _owned(part: Part, work: Work) -> list[int]:
    """Returns the positions, in the list of measured calls, of the calls that this rank runs; `part.exact` has the
    float outputs of the same calls, in the same order."""
    return [index for index in range(len(part.positions)) if work.ranks.owns(index)]


def with_advice(
    report: dict[str, Any], shares: Mapping[str, float], tried: Tried | None, output: Sequence[Power]
) -> dict[str, Any]:
    """Returns `report`, the content of report.json, with two additions: the entry `advice`, and the field
    `output_share` for each layer in `shares`. The entry is None if `tried`, the measured trial, is None or gained less
    than 0.5 dB. `output`: signal and noise of the output in each measured call with all layers in 8 bits, rank after
    rank."""
    rows = [
        row | ({"output_share": round(shares[row["name"]], 4)} if row["name"] in shares else {})
        for row in report["layers"]
    ]
    return report | {"layers": rows, "advice": tried and advice_of(tried, output, rows)}


def advice_of(tried: Tried, output: Sequence[Power], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the entry `advice` of report.json, or None if the gain is below 0.5 dB.

    The entry is a dict: `keep_float`, the values of --keep-float; `layers`, the number of layers that these leave
    float; `bytes`, by how much this makes the weights larger; `gain`, in dB; `calls`, the number of calls that the gain
    was measured on; `held_out`, whether these calls are held out.

    `output` has signal and noise of the output in each measured call with all layers in 8 bits, rank after rank; `rows`
    are the layers in report.json.
    """
    trial, power, order = tried
    before = total(output[order.index(index)] for index in trial.calls)
    if not (before.noise > 0.0 and power.noise > 0.0):
        return None
    gain = 10.0 * math.log10(before.noise / power.noise)
    if gain < MIN_GAIN:
        return None
    cost = sum(row["bytes_before"] - row["bytes_after"] for row in rows if row["name"] in trial.names)
    return {
        "keep_float": list(trial.patterns), "layers": len(trial.names), "bytes": cost, "gain": round(gain, 2),
        "calls": len(trial.calls), "held_out": trial.held_out,
    }  # fmt: skip


def advice_line(advice: Mapping[str, Any] | None) -> str | None:
    """Returns a sentence with the command-line options to try next, what they cost and what they bring, from the entry
    `advice` of report.json; None without advice."""
    if not advice:
        return None
    options = " ".join(f"--keep-float {shlex.quote(pattern)}" for pattern in advice["keep_float"])
    count = advice["layers"]
    layers = "1 layer stays" if count == 1 else f"{count} layers stay"
    return (
        f"Advice: add {options}. {layers} float, which costs {size(advice['bytes'])} and raises the output SQNR by "
        f"{advice['gain']:.1f} dB, measured on {calls_text(advice)}."
    )
