"""Fills the template."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from octavo.calibrate.learning_curve import verdict
from octavo.calibrate.report import measured_on

from ..comparing.image_metrics import png
from . import figures
from .words import FILTERS, share

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)  # fmt: skip
_ENVIRONMENT.filters.update(FILTERS)


def page(content: Mapping[str, Any], pictures: Sequence[tuple[np.ndarray, np.ndarray]] = ()) -> bytes:
    """The page as a file: the same content gives the same bytes.

    `content` has `report`, and of a comparison what `compare_command.content_of` says; `pictures` are the pairs of its
    prompts, uint8 (frames, height, width, 3), whose first frames are shown. Of a report, what its calibration took is
    left out: two calibrations of the same calls have the same page.
    """
    report = content["report"]
    rows = report.get("layers", [])
    totals = content.get("totals", {})
    heat, by_step = content.get("ranges", {}), totals.get("step_sqnr", [])
    drawn = {
        "trajectory": figures.drawn(figures.trajectory, totals.get("latent_error")),
        "steps": figures.drawn(figures.by_step, [row for row in by_step if row["sqnr"] is not None]),
        "layers": figures.drawn(figures.layers, [row for row in rows if row.get("sqnr") is not None]),
        "heat": figures.drawn(figures.heat, heat if _positive(heat) else None),
    }
    shown = [tuple(_data(video[0]) for video in pair) for pair in pictures]
    embedded = {name: svg and Markup(svg) for name, svg in drawn.items()}
    text = _ENVIRONMENT.get_template("template.html.j2").render(
        content=content, report=report, rows=rows, totals=totals, prompts=content.get("prompts", []), pictures=shown,
        figures=embedded, measured=_measured(report), notes=_notes(report), kept=_kept(rows),
        quantized=_worst_first(rows), pixelated=bool(pictures) and max(pictures[0][0].shape[1:3]) <= 256,
    )  # fmt: skip
    return text.encode()


def _measured(report: Mapping[str, Any]) -> str:
    """The interval and the calls of the SQNR in a report."""
    totals = report.get("totals", {})
    interval = totals.get("output_sqnr_interval")
    around = "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f} dB; "
    return f"{around}{measured_on(totals)}; their inputs are within the ranges, so other prompts may have less"


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Notes of the calibration: its warnings, its budget, whether its calls were enough."""
    lines = list(report.get("warnings", []))
    if budget := report.get("budget"):
        mixed = ", ".join(f"{layers} {scheme}" for scheme, layers in budget["schemes"].items())
        error = share(budget["error"]["relative"])
        lines.append(
            f"Budget {budget['budget']}: {mixed}, {budget['float']} float; the final latents differ by {error} of "
            "their power."
        )
    enough = verdict(report.get("enough", []))
    return [*lines, enough] if enough else lines


def _positive(heat: Mapping[str, Any]) -> bool:
    return any(value for row in heat.get("maximum", []) for value in row)


def _data(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _kept(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(reason, layers) of what stayed float."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["scheme"] is None:
            found.setdefault(row["reason"] or "not said", []).append(row["name"])
    return list(found.items())


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The quantized layers; those without an error or not measured last."""

    def place(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        sqnr = row.get("sqnr")
        return sqnr is None, sqnr or 0.0, row["name"]

    return sorted((row for row in rows if row["scheme"]), key=place)
