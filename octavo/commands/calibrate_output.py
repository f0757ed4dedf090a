"""Writes and prints the results of `octavo calibrate` and `octavo calibrate-cnn`."""

from typing import Any

from torch import nn

from octavo.calibrate.advice import advice_line
from octavo.calibrate.formats.export import export
from octavo.calibrate.learning_curve import verdict
from octavo.calibrate.report import measured_on, worst
from octavo.calibrate.result import Result
from octavo.capture.fingerprint import Origin
from octavo.capture.progress import duration
from octavo.capture.ranks import ALONE, Ranks

from ..page import PAGE_FILE, page
from ..terminal import Terminal, count_of, size
from .attention_output import show_attention
from .calibrate_options import CalibrateOptions, formats_of
from .causes_output import show_causes


def show_budget(report: dict[str, Any], terminal: Terminal, most: int = 10) -> None:
    """Prints how a calibration used its --budget, from the content of report.json. A table has the `most` layers to
    which the final latents are most sensitive. A line says how many layers got each scheme (W8A8 and so on), and the
    error of the final latents, as measured and as estimated. For the estimate, each layer is quantized while all others
    stay float; the errors that these single layers cause are added up."""
    spent, schemes = report["budget"], list(report["budget"]["schemes"])
    rows = [row for row in report["layers"] if row.get("trajectory_error")]
    terminal.table(
        "Most sensitive layers: mean squared error of the final latents if only this layer is quantized",
        ["layer", "chosen scheme", *schemes],
        [
            [
                row["name"],
                row["scheme"] or "float",
                *(f"{_number(row['trajectory_error'].get(scheme))}" for scheme in schemes),
            ]
            for row in sorted(rows, key=lambda row: -max(row["trajectory_error"].values()))[:most]
        ],
    )
    count, time, error = spent["bytes"], spent["time"], spent["error"]
    mixed = [f"{layers} {scheme}" for scheme, layers in spent["schemes"].items()] + [f"{spent['float']} float"]
    share = count["used"] / count["float"]
    terminal.say(
        f"Budget {spent['budget']}: {', '.join(mixed)}; {size(count['used'])} ({share:.1%} of float), an estimated "
        f"{time['used']:.2f}x of the time. The mean squared error of the final latents is {error['measured']:.3g}, "
        f"{error['relative']:.2g} of the latents' mean square; the errors of one quantized layer at a time add up to "
        f"{error['estimated']:.3g}. The pipeline ran {spent['runs']} times."
    )
    terminal.event("budget", **spent)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


# keys of a layer in the report, and the columns of the table of layers that show them
_COLUMNS = {"range": "input range", "scale": "input scale", "zero_point": "zero point"}


def write(result: Result, model: nn.Module, options: CalibrateOptions, origin: Origin | None = None) -> None:
    """Writes the checkpoint in the formats of --format, and into its directory an HTML page that shows report.json.

    `origin`, for the manifest, is the fingerprint of the float model in the dtype in which it was captured. If it is
    None, the manifest gets the fingerprint of `model` in the dtype that the model has now.
    """
    export(
        result, model, options.out, formats_of(options), overwrite=options.overwrite,
        group_readable=options.group_readable, files={PAGE_FILE: page([{"report": result.report}])},
        max_shard_size=options.max_shard_size, origin=origin,
    )  # fmt: skip


def show(result: Result, options: CalibrateOptions, terminal: Terminal, seconds: float, ranks: Ranks = ALONE) -> None:
    """Prints the `result` of a calibration, which took `seconds`. Warnings are always printed. Without --json, tables
    and a summary follow. With --json, a JSON object with the totals follows, for programs."""
    for warning in result.warnings:
        terminal.warn(warning)
    report = result.report
    _show_tables(report, terminal)
    totals = report["totals"]
    quality = "" if totals["output_sqnr"] is None else f"; output SQNR {quality_of(totals)}"
    codes = "8-bit integers" if options.element == "int8" else options.element
    terminal.say(
        f"{options.out}: {totals['quantized']} layers in {codes}, {totals['kept_float']} float{quality}; "
        f"{size(totals['bytes_before'])} of layers became {size(totals['bytes_after'])}; "
        f"{count_of(totals['calls'], 'call')}, {duration(seconds)}, peak memory {size(report['peak_memory'])}."
    )
    for line in filter(None, (verdict(report["enough"]), advice_line(report["advice"]))):
        terminal.say(line)
    terminal.event(
        "done", out=str(options.out), totals=totals, enough=report["enough"], advice=report["advice"],
        seconds=round(seconds, 3), peak_memory=report["peak_memory"], ranks=ranks.world, sent=ranks.sent,
    )  # fmt: skip


def _show_tables(report: dict[str, Any], terminal: Terminal) -> None:
    """Prints what precedes the summary of a calibration, from `report`, the content of report.json: the float layers,
    the worst layers, and what --budget, --attention and --explain found."""
    reasons: dict[str, list[str]] = {}
    for row in report["layers"]:
        if row["scheme"] is None:
            reasons.setdefault(row["reason"], []).append(row["name"])
    terminal.table(
        "Layers that stay float", ["layers", "reason"],
        [[_first_names(names), reason] for reason, names in reasons.items()],
    )  # fmt: skip
    shown = [key for key in _COLUMNS if any(key in row for row in worst(report))]
    terminal.table(
        "Layers with the lowest SQNR", ["layer", "SQNR", *(_COLUMNS[key] for key in shown)],
        [
            [row["name"], f"{row['sqnr']:.1f} dB", *(_extent(row[key]) if key in row else "" for key in shown)]
            for row in worst(report)
        ],
    )  # fmt: skip
    if "budget" in report:
        show_budget(report, terminal)
    if "attention" in report:
        show_attention(report["attention"], terminal)
    if "causes" in report:
        show_causes(report, terminal)


def quality_of(totals: dict[str, Any]) -> str:
    """Returns the SQNR of the model's output in words, with its 95 % interval and the calls that it was measured on,
    such as "36.3 dB (95 % interval 35.9 to 36.8) on 8 held-out calls". `totals` is the entry `totals` of
    report.json."""
    interval = totals["output_sqnr_interval"]
    around = "" if interval is None else f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
    return f"{totals['output_sqnr']:.1f} dB{around} {measured_on(totals)}"


def _extent(value: Any) -> str:
    if isinstance(value, list):
        low, high = min(value), max(value)
        return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
    return f"{value:.3g}"


def _first_names(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
