"""Prints what causes the errors of quantized layers, from the entry `causes` of report.json."""

import math
from collections.abc import Mapping
from typing import Any

from octavo.calibrate.report_file import calls_text

from ..terminal import Terminal


def show_causes(report: dict[str, Any], terminal: Terminal) -> None:
    """Prints two tables from the entry `causes` of `report`, the content of report.json: one by kind of layer, one by
    noise level. Each row has the SQNR of the layers and the shares of the causes in their error. The table by kind also
    has the estimated share of each kind in the error of the model's output, if that was estimated."""
    section = report["causes"]
    columns = ["layers", "SQNR", *section["names"]]
    of_output = {row["name"]: row["output_share"] for row in report["layers"] if "output_share" in row}
    by_kind = {
        kind["kind"]: sum(of_output.get(row["name"], 0.0) for row in section["layers"] if row["kind"] == kind["kind"])
        for kind in section["kinds"]
    }
    terminal.table(
        f"Causes of the layers' errors on {calls_text(section)}, by kind of layer",
        ["kind", *columns, *(["share in the output's error"] if of_output else [])],
        [
            [row["kind"], *_cells(row), *([_percent(by_kind[row["kind"]])] if of_output else [])]
            for row in section["kinds"]
        ],
    )
    if len(section["levels"]) > 1:
        terminal.table(
            "The same by noise level",
            ["noise level", *columns], [[_interval(row), *_cells(row)] for row in section["levels"]],
        )  # fmt: skip
    terminal.event("causes", **section)


def _cells(row: Mapping[str, Any]) -> list[str]:
    error = row["error"]
    sqnr = f"{-10.0 * math.log10(error):.1f} dB" if error else "no error"
    return [str(row["layers"]), sqnr, *(_percent(share / error) if error else "" for share in row["shares"])]


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"  # without the sign of a negative share that is rounded to 0


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    if low is None:
        return f"below {high:.4g}"
    return f"from {low:.4g}" if high is None else f"{low:.4g} to {high:.4g}"
