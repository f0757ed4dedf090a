"""Makes the report of a calibration: ranges, scales, errors and bytes of every layer, as plain JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .choice import NEAREST, Choice
from .guard import Guarded, warning_of
from .layers.changes import hooks_on_all_modules
from .layers.modules import QuantizedLayer
from .layers.scheme import Range
from .layers.transforms import Rotate
from .mixed_precision.mix import Mixture
from .plan import Entry, Plan
from .replay.sqnr import Power, interval, total
from .resources import Stopwatch, peak_memory
from .settings import Settings

FORMAT = 1  # version of report.json
NEVER_RAN = "never ran on the calibration calls"
ZERO_INPUT = "its input was zero in every call"


class Findings(NamedTuple):
    """The results of a calibration that the report shows.

    Three dicts have layer names as keys: `choices` has the layer's choice, `ranges` the ranges of its input (one for
    each timestep bin), `powers` the signal and noise of its output. `calls`: the number of calibration calls. `output`:
    signal (sum of squares) and noise (sum of squared errors) of the model's output in each measured call. `held_out`:
    how many of the measured calls are held out. `guarded`: what was done about layers that their scheme would lose.
    """

    choices: Mapping[str, Choice]
    ranges: Mapping[str, list[Range]]
    powers: Mapping[str, Power]
    calls: int
    output: Sequence[Power]
    held_out: int
    guarded: Sequence[Guarded] = ()


def report_of(
    plan: Plan, layers: Mapping[str, QuantizedLayer], findings: Findings, settings: Settings, watch: Stopwatch
) -> dict[str, Any]:
    """Returns the content of report.json; `findings` has the results, `watch` the seconds by stage.

    | key         | content                                                                                          |
    |-------------|--------------------------------------------------------------------------------------------------|
    | layers      | a row for each layer: name, kind, shape, scheme (null: float), reason, bytes_before, bytes_after |
    |             | - only if quantized: weight_scale [smallest, largest]; sqnr in dB (null: no error)               |
    |             | - only where estimated (advice.py): output_share, the share in the error of the model's output   |
    |             | - only W8A8, W8A8_TIMESTEP: range [low, high], scale, zero_point of the input (lists over bins)  |
    |             | - only if smoothed: multiplier [smallest, largest]; if rotated: rotation, channels in a group    |
    | totals      | quantized, kept_float: numbers of layers; bytes_before, bytes_after; output_sqnr in dB and its   |
    |             | 95 % interval output_sqnr_interval [low, high] (null: too few calls); calls: calibration calls;  |
    |             | calls_measured: the calls that output_sqnr and the sqnr of layers are measured on;               |
    |             | calls_held_out: how many of the measured calls are held out                                      |
    | enough      | learning curve: rows of calls, prompts, output_sqnr in dB; [] where it was not measured          |
    | advice      | which layers to leave float next: `advice.advice_of`; null where nothing is worth advising       |
    | causes      | only with `settings.explain`: `error_causes.causes_section`                                      |
    | guard       | a row for each lost layer: `Guarded.reported`                                                    |
    | warnings    | the warnings for the user, one line each                                                         |
    | seconds     | seconds by stage                                                                                 |
    | peak_memory | largest memory of the process, in bytes                                                          |
    """
    rows = [_row(entry, layers.get(entry.name), findings, settings) for entry in plan.entries]
    return {
        "format": FORMAT,
        "settings": settings.reported,
        "layers": rows,
        "totals": _totals(rows, findings),
        "guard": [row.reported for row in findings.guarded],
        "warnings": [*warnings_of(plan), *filter(None, [warning_of(findings.guarded, plan, settings)])],
        "seconds": {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
        "peak_memory": peak_memory(),
    }


def _totals(rows: Sequence[Mapping[str, Any]], findings: Findings) -> dict[str, Any]:
    extent, quantized = interval(findings.output), sum("weight_scale" in row for row in rows)
    return {
        "quantized": quantized,
        "kept_float": len(rows) - quantized,
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
        "output_sqnr": total(findings.output).sqnr,
        "output_sqnr_interval": None if extent is None else list(extent),
        "calls": findings.calls,
        "calls_measured": len(findings.output),
        "calls_held_out": findings.held_out,
    }


def _row(entry: Entry, layer: QuantizedLayer | None, findings: Findings, settings: Settings) -> dict[str, Any]:
    """Returns the row for the layer of `entry` in the list `layers` of report.json. `layer` is the layer's integer
    form; None for a layer that stays float. `findings` has the results for all layers."""
    choice, power = findings.choices.get(entry.name), findings.powers.get(entry.name)
    ranges = findings.ranges.get(entry.name)
    before = entry.bytes
    row: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "shape": list(entry.shape),
        "scheme": entry.scheme,
        "reason": entry.reason or None,
        "bytes_before": before,
        "bytes_after": before,
    }
    if power is not None and power.count:
        row["mse"], row["sqnr"] = power.mean_square, None if power.sqnr is None else round(power.sqnr, 2)
    if layer is None or choice is None:
        return row
    row["bytes_after"] = sum(tensor.nbytes for tensor in layer.state_dict().values())
    row["weight_scale"] = [layer.weight_scale.min().item(), layer.weight_scale.max().item()]
    row["scheme"] = layer.scheme
    row["weights"], row["corrected"] = choice.method, choice.correction is not None
    if settings.weights and choice.method == NEAREST:
        row["note"] = f"{', '.join(settings.weights)}: no better than rounding to the nearest on held-out calls"
    tensors = {} if choice.transform is None else choice.transform.tensors
    if (multiplier := tensors.get("mul_scale")) is not None:
        row["multiplier"] = [multiplier.min().item(), multiplier.max().item()]
    if (rotation := tensors.get("rotation")) is not None:
        row["rotation"] = Rotate(rotation).size
    if ranges and layer.calibrated:
        row["range"] = [min(extent.low for extent in ranges), max(extent.high for extent in ranges)]
    if layer.calibrated:
        row["scale"], row["zero_point"] = layer.input_scale.tolist(), layer.input_zero_point.tolist()
    return row


def with_mixture(report: dict[str, Any], mixture: Mixture) -> dict[str, Any]:
    """Returns the report of a calibration under a budget: `report` with the additions from `mixture` that the table
    lists. A search under a budget switches layers from float to a scheme, a group of layers together, and runs the
    pipeline. In the table, error is the mean squared error of the final latents.

    | key    | content                                                                                               |
    |--------|-------------------------------------------------------------------------------------------------------|
    | layers | trajectory_error: dict from scheme to the error when only the layer's group has the scheme, and all   |
    |        | other layers are float                                                                                |
    | budget | a dict with these keys:                                                                               |
    |        | - budget: the text that the user wrote                                                                |
    |        | - groups, runs: numbers of groups and of runs of the pipeline                                         |
    |        | - bytes: a dict of float (all layers float), limit (None: no limit) and used                          |
    |        | - time: the same for the estimated time, as a share of the time of the float layers                   |
    |        | - schemes: dict from scheme to number of layers; float: number of float layers                        |
    |        | - exchanges: how many times one or two groups got another scheme because that lowered the error       |
    |        | - error: a dict of measured (after the exchanges), before (measured before the exchanges), relative   |
    |        | (measured / mean square of the float latents) and estimated (sum of the groups' errors, each measured |
    |        | with all other groups float)                                                                          |
    """
    errors = mixture.errors
    rows = [
        row | ({"trajectory_error": errors[row["name"]]} if row["name"] in errors else {}) for row in report["layers"]
    ]
    return report | {"layers": rows, "budget": mixture.report}


def warnings_of(plan: Plan) -> list[str]:
    """Returns the warnings of a plan, one line each: one if torch has hooks that run around every module, one for each
    reason why layers could not be quantized, and one for each reason why layers have no integer form."""
    lines = list(filter(None, [hooks_on_all_modules()]))
    for reason, (name, *more) in _names_by_reason(entry for entry in plan.entries if entry.forced).items():
        others = f" and {len(more)} more layer{'s' if len(more) > 1 else ''}" if more else ""
        lines.append(f"{name}{others}: {reason}; {'these stay' if more else 'it stays'} float.")
    unsupported = _names_by_reason(entry for entry in plan.entries if entry.unsupported)
    lines += [
        f"{reason}: {len(names)} layer{'s stay' if len(names) > 1 else ' stays'} float."
        for reason, names in sorted(unsupported.items())
    ]
    return lines


def _names_by_reason(entries: Iterable[Entry]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.reason, []).append(entry.name)
    return names


def measured_on(totals: Mapping[str, Any]) -> str:
    """Returns a text such as "on 16 calls, 4 of them held out", which describes the calls that the SQNR of a report was
    measured on, given the `totals` of the report."""
    count, held_out = totals.get("calls_measured"), totals.get("calls_held_out", 0)
    if not count:
        return "on calibration calls"
    if held_out == count:
        return f"on {count} held-out calls"
    if count == totals["calls"]:
        return "on the only call" if count == 1 else f"on all {count} calls"
    return f"on {count} calls, {held_out} of them held out" if held_out else f"on {count} of {totals['calls']} calls"


def worst(report: Mapping[str, Any], count: int = 10) -> list[dict[str, Any]]:
    """Returns the rows of the `count` quantized layers in `report` with the lowest SQNR, the lowest first."""
    rows = [row for row in report["layers"] if row.get("sqnr") is not None]
    return sorted(rows, key=lambda row: (row["sqnr"], row["name"]))[:count]
