"""Renders the page of a comparison or of a calibration from its template, template.html.j2."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from octavo.calibrate.advice import advice_line
from octavo.calibrate.attention.choice import attention_lines
from octavo.calibrate.learning_curve import verdict
from octavo.calibrate.report import measured_on

from ..comparing.image_metrics import png
from . import figures
from .words import FILTERS, codes_of, percent

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)  # fmt: skip
_ENVIRONMENT.filters.update(FILTERS)


def page(content: Mapping[str, Any], pictures: Sequence[tuple[np.ndarray, np.ndarray]] = ()) -> bytes:
    """Returns the page as the bytes of an HTML file; the same content gives the same bytes.

    For the page of a calibration, `content` is {"report": report}, where `report` is the content of report.json. For
    the page of a comparison, `content` comes from `commands.compare.content_of`. `pictures` then has the float and the
    int8 picture of each prompt, uint8 (frames, height, width, 3); the page shows the first frame. Seconds and memory of
    a calibration are not on the page, so two calibrations from the same calls have the same page.
    """
    report = content["report"]
    rows = report.get("layers", [])
    totals = content.get("totals", {})
    heat, by_step = content.get("ranges", {}), totals.get("step_sqnr", [])
    svgs = {
        "trajectory": figures.figure_or_none(figures.trajectory, totals.get("latent_error")),
        "steps": figures.figure_or_none(figures.by_step, [row for row in by_step if row["sqnr"] is not None]),
        "layers": figures.figure_or_none(figures.layers, [row for row in rows if row.get("sqnr") is not None]),
        "heat": figures.figure_or_none(figures.heat, heat if _has_values(heat) else None),
    }
    urls = [tuple(_data_url(video[0]) for video in pair) for pair in pictures]
    embedded = {name: svg and Markup(svg) for name, svg in svgs.items()}
    text = _ENVIRONMENT.get_template("template.html.j2").render(
        content=content, report=report, rows=rows, totals=totals, prompts=content.get("prompts", []), pictures=urls,
        figures=embedded, measured=_measured(report), notes=_notes(report), float_layers=_float_layers(rows),
        codes=codes_of(content), quantized=_worst_first(rows),
        pixelated=bool(pictures) and max(pictures[0][0].shape[1:3]) <= 256,
    )  # fmt: skip
    return text.encode()


def _measured(report: Mapping[str, Any]) -> str:
    """Returns a note on the output SQNR of a report: its interval, and the calls that it was measured on."""
    totals = report.get("totals", {})
    interval = totals.get("output_sqnr_interval")
    around = "" if interval is None else f"95 % interval {interval[0]:.1f} to {interval[1]:.1f} dB, "
    return f"{around}{measured_on(totals)}; prompts that were not captured may have a lower SQNR"


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Returns the notes on a calibration, from the content of report.json: its warnings, how many layers got each
    scheme under --budget, how many attention modules are quantized, whether more prompts would raise the SQNR, and
    which layers to leave float."""
    lines = list(report.get("warnings", []))
    if budget := report.get("budget"):
        mixed = ", ".join(f"{layers} {scheme}" for scheme, layers in budget["schemes"].items())
        error = percent(budget["error"]["relative"])
        lines.append(
            f"Budget {budget['budget']}: {mixed}, {budget['float']} float. "
            f"The mean squared error of the final latents is {error} of the mean square of the latents."
        )
    lines += attention_lines(report.get("attention", {}))
    return [*lines, *filter(None, [verdict(report.get("enough", [])), advice_line(report.get("advice"))])]


def _has_values(heat: Mapping[str, Any]) -> bool:
    return any(value for row in heat.get("maximum", []) for value in row)


def _data_url(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _float_layers(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns a list of (reason, names): for each reason why layers stayed float, the names of these layers. `rows` are
    the layers in report.json."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["scheme"] is None:
            names.setdefault(row["reason"] or "no reason given", []).append(row["name"])
    return list(names.items())


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the quantized layers among `rows`, the layers in report.json, the lowest SQNR first. Layers without an
    SQNR, which were not measured or have no error, come last."""

    def sort_key(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        sqnr = row.get("sqnr")
        return sqnr is None, sqnr or 0.0, row["name"]

    return sorted((row for row in rows if row["scheme"]), key=sort_key)
