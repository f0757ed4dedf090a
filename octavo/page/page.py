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
from ..terminal import size
from . import figures
from .words import FILTERS, MEASURES, PICTURE_MEASURES, codes_of, percent, results_of

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)  # fmt: skip
_ENVIRONMENT.filters.update(FILTERS)


_HINTS = {
    "ssim": "1 means identical pictures",
    "lpips": "0 means identical pictures",
    "st_lpips": "shift-tolerant LPIPS; 0 means identical pictures",
    "flip": "0 means identical pictures, 1 the largest difference",
    "color_video_vdp": "10 means identical videos",
    "text_agreement": "of the texts that are read in both pictures, for prompts that ask for text",
}


def page(contents: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[np.ndarray]] = ()) -> bytes:
    """Returns the page as the bytes of an HTML file; the same contents give the same bytes.

    For the page of a calibration, `contents` is [{"report": report}], where `report` is the content of report.json. For
    the page of a comparison, `contents` comes from `commands.compare_output.contents_of`, one for each checkpoint.
    `pictures` then has for each pair the float picture and that of each checkpoint, uint8 (frames, height, width, 3);
    the page shows the first frame. Seconds and memory of a calibration are not on the page, so two calibrations from
    the same calls have the same page.
    """
    first, heat = contents[0], contents[0].get("ranges", {})
    prompts = [content.get("prompts", []) for content in contents]
    pairs = [
        {"index": index, "rows": rows, "pictures": [_data_url(video[0]) for video in videos]}
        for index, (rows, videos) in enumerate(zip(zip(*prompts, strict=True), pictures, strict=True))
    ]
    svg = figures.figure_or_none(figures.heat, heat if _has_values(heat) else None)
    text = _ENVIRONMENT.get_template("template.html.j2").render(
        content=first, columns=[_column(index, content) for index, content in enumerate(contents)],
        pairs=sorted(pairs, key=_badness, reverse=True), heat=svg and Markup(svg), fronts=_fronts(contents),
        names=PICTURE_MEASURES, hints=_HINTS, interval_note=_interval_note(pairs),
        pixelated=bool(pictures) and max(pictures[0][0].shape[1:3]) <= 256,
    )  # fmt: skip
    return text.encode()


def _column(index: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page shows of one checkpoint alone. `content` is the result of this checkpoint, and `index` its
    position among the checkpoints, from 0."""
    report, totals = content["report"], content.get("totals", {})
    rows = [{"number": number, **row} for number, row in enumerate(report.get("layers", []))]
    svgs: dict[str, str | None] = {
        "trajectory": figures.figure_or_none(figures.trajectory, totals.get("latent_error"), f"trajectory{index}"),
        "steps": figures.figure_or_none(
            figures.by_step, [row for row in totals.get("step_sqnr", []) if row["sqnr"] is not None], f"steps{index}"
        ),
        "layers": figures.figure_or_none(
            figures.layers, [row for row in rows if row["scheme"] and row.get("sqnr") is not None], f"layers{index}"
        ),
    }
    peak = totals.get("memory", {}).get("quantized")
    memory = {"peak memory, with all models loaded": size(peak)} if peak else {}
    return {
        "index": index, "content": content, "report": report, "totals": totals, "rows": rows,
        "codes": codes_of(content), "name": Path(content.get("checkpoint", "")).name,
        "figures": {name: svg and Markup(svg) for name, svg in svgs.items()},
        "measured": _measured(report), "notes": _notes(report), "float_layers": _float_layers(rows),
        "quantized": _worst_first(rows), "results": results_of(content) | memory if totals else {},
    }  # fmt: skip


def _interval_note(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a note for the page on the 95 % intervals of the measures: how they were estimated, or why there are
    none. `pairs` are the compared pairs of pictures, each with its prompt."""
    if len(pairs) < 2:
        return "One pair gives no 95 % intervals. Draw more with --limit or --seeds."
    prompts = len({pair["rows"][0]["prompt"] for pair in pairs})
    unit = (
        f"{prompts} prompts" if prompts > 1 else f"{len(pairs)} seeds of one prompt, so they say nothing about others"
    )
    return (
        f"The 95 % intervals say how far a measure may be off with other prompts and seeds: a bootstrap over {unit}, "
        "or for a share of pictures the score interval of Wilson. With fewer than about five prompts they are too "
        "narrow."
    )


def _badness(pair: Mapping[str, Any]) -> float:
    """Returns the largest mean squared difference between the float picture of `pair` and the picture of any
    checkpoint. The page shows the pairs with the largest value first."""
    return max(row["mean_square"] for row in pair["rows"])


def _fronts(contents: Sequence[Mapping[str, Any]]) -> list[tuple[Markup, str]]:
    """Returns two figures, of error against size and of error against time, with a point for each checkpoint, and the
    caption of each figure. The error is LPIPS or ST-LPIPS, or without them that of the pixels. Returns [] for a single
    checkpoint."""
    if len(contents) < 2:
        return []
    totals = [content["totals"] for content in contents]
    key = next((key for key in ("lpips", "st_lpips") if all(total[key] is not None for total in totals)), "psnr")
    errors = [_error(total[key], key) for total in totals]
    bounds = [[_error(b, key) for b in total["intervals"][key] or ()] for total in totals]
    name = MEASURES[key] if key != "psnr" else "error of the pixels, % of white"
    mebi = [total["size"]["quantized"] / 2**20 for total in totals]
    seconds = [total["speed"]["quantized"] for total in totals]
    axes = (("size", "size of the denoiser, MiB", mebi), ("time", "seconds per picture", seconds))
    return [
        (
            Markup(figures.front(values, errors, bounds, (label, name), f"front-{kind}")),
            f"Error against {kind}. A checkpoint below and to the left of another is better; the line joins those that "
            "no other beats. Bars: 95 % intervals.",
        )
        for kind, label, values in axes
    ]


def _error(value: float | None, key: str) -> float:
    """Returns the `value` of the measure `key` as an error that is 0 for equal pictures. A PSNR becomes the root of the
    mean squared difference of the pixels, in percent of 255; a learned distance, such as LPIPS, is an error already.
    None becomes 0."""
    if key != "psnr":
        return value or 0.0
    return 0.0 if value is None else 100.0 * 10.0 ** (-value / 20.0)


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
