"""Draws the figures of the page as SVG elements.

The text of a figure can be searched and copied, its colours are those of the page, light or dark, and the same data
gives the same bytes.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

# matplotlib draws with these placeholders, and `_svg` replaces them by colours of the page
INK, LINE, SERIES, MARK = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {INK: "currentColor", LINE: "var(--line)", SERIES: "var(--accent)", MARK: "var(--warn)"}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "octavo", "text.parse_math": False, "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINE,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.8, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
_WIDTH = 4.5  # inches; small enough that text of 10 points can be read on a phone


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yields an empty figure with one pair of axes, `height` inches high, in the style of the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, words: str) -> str:
    """Returns the figure as an SVG element. The ids inside the element start with `name`, so that they differ from
    those of other figures; `words` is the label of the element for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{words}">', text, count=1)
    return re.sub(r">\s+<", "><", text).strip()


def _count_from_one(axes: Axes, last: int) -> None:
    """Makes the horizontal axis run from 1 to `last`, with ticks at whole numbers."""
    axes.set_xlim(0.5 if last < 10 else 0, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _locator(low: float, high: float) -> Locator:
    """Returns the ticks of a logarithmic axis from `low` to `high`: 1, 2 and 5 times powers of ten, or evenly spaced
    numbers if fewer than two of these fit."""
    locator = LogLocator(subs=(1.0, 2.0, 5.0), numticks=12)
    fitting = [value for value in locator.tick_values(low, max(high, low * 1.01)) if low <= value <= high]
    return locator if len(fitting) > 1 else MaxNLocator(4)


def trajectory(steps: Sequence[Mapping[str, float]], name: str = "trajectory") -> str:
    """Draws the relative error of the latents after each denoising step: the median over prompts as a line, the
    interval from the smallest to the largest error as a band. Each of `steps` has the three errors of a step, under the
    keys `median`, `smallest` and `largest`. `name` begins the ids of the figure."""
    with _drawing(2.5) as (figure, axes):
        numbers = range(1, len(steps) + 1)
        low, mid, high = ([100 * step[key] for step in steps] for key in ("smallest", "median", "largest"))
        axes.fill_between(numbers, low, high, color=SERIES, alpha=0.2, linewidth=0)
        axes.plot(numbers, mid, color=SERIES, marker="o" if len(steps) < 3 else None)
        if min(low) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_locator(min(low), max(high)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        _count_from_one(axes, len(steps))
        axes.set_xlabel("denoising step")
        axes.set_ylabel("error of the latents")
        return _svg(figure, name, f"Relative error of the latents over {len(steps)} denoising steps")


def by_step(values: Sequence[Mapping[str, Any]], name: str = "steps") -> str:
    """Draws the SQNR of the quantized denoiser's output in each denoising step, measured on the inputs that the float
    denoiser got in this step. Each of `values` has a `step` and its `sqnr` in dB. `name` begins the ids of the
    figure."""
    with _drawing(2.5) as (figure, axes):
        steps = [row["step"] for row in values]
        axes.plot(steps, [row["sqnr"] for row in values], color=SERIES, marker="o", markersize=3)
        _count_from_one(axes, max(steps))
        axes.set_xlabel("denoising step")
        axes.set_ylabel("output SQNR, dB")
        return _svg(figure, name, f"Output SQNR over {len(values)} denoising steps")


def layers(rows: Sequence[Mapping[str, Any]], name: str = "layers") -> str:
    """Draws the SQNR of each quantized layer in the order of `rows`, the layers of report.json, and draws the three
    lowest in another colour. Each point is a link to the element with the id NAME-row-NUMBER, where NUMBER is the key
    `number` of the row, and has the layer's name as its tooltip."""
    sqnrs = [row["sqnr"] for row in rows]
    with _drawing(2.6) as (figure, axes):
        worst = sorted(range(len(sqnrs)), key=lambda index: (sqnrs[index], index))[:3]
        rest = [index for index in range(len(sqnrs)) if index not in worst]
        for points, area, colour in ((rest, 16, SERIES), (worst, 26, MARK)):
            dots = axes.scatter([i + 1 for i in points], [sqnrs[i] for i in points], s=area, color=colour, linewidths=0)
            dots.set_urls([f"#row-{rows[i]['number']}" for i in points])
        _count_from_one(axes, len(sqnrs))
        axes.set_xlabel("quantized layer, from input to output")
        axes.set_ylabel("SQNR, dB")
        text = _svg(figure, name, f"SQNR of {len(sqnrs)} layers, from {min(sqnrs)} to {max(sqnrs)} dB")
    titles = {row["number"]: f"{row['name']}: {row['sqnr']:.1f} dB" for row in rows}
    # the table below lists the same layers, so the keyboard does not stop at every point
    return re.sub(
        rf'<a xlink:href="(#{name}-row-(\d+))"[^>]*>',
        lambda match: f'<a href="{match[1]}" tabindex="-1"><title>{escape(titles[int(match[2])])}</title>', text,
    )  # fmt: skip


def front(
    values: Sequence[float],
    errors: Sequence[float],
    bounds: Sequence[Sequence[float]],
    labels: tuple[str, str],
    name: str,
) -> str:
    """Draws the error of each checkpoint against a cost, such as its size, and joins the checkpoints that no other
    beats in both (Pareto front).

    `values` are the costs, `errors` the errors, `bounds` the two bounds of each error's interval ([] without one), and
    `labels` the names of both axes. The points are numbered from 1. `name` begins the ids of the figure.
    """
    with _drawing(2.6) as (figure, axes):
        points = sorted(zip(values, errors, strict=True))
        best = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        axes.plot([x for x, _ in best], [y for _, y in best], color=LINE, zorder=1)
        for number, (x, y, ends) in enumerate(zip(values, errors, bounds, strict=True), 1):
            if ends:
                axes.plot([x, x], [min(ends), max(ends)], color=SERIES, linewidth=1, alpha=0.6)
            axes.scatter([x], [y], s=26, color=SERIES if (x, y) in best else MARK, linewidths=0, zorder=2)
            axes.annotate(str(number), (x, y), xytext=(6, 3), textcoords="offset points")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return _svg(figure, name, f"{labels[1]} against {labels[0]} of {len(values)} checkpoints")


def heat(ranges: Mapping[str, Any]) -> str:
    """Draws a heat map of the largest |input| of each layer in each denoising step, with a logarithmic colour scale.
    `ranges` is a dict of three lists: `layers` has the names of the layers, `steps` the numbers of the steps, and
    `maximum` a list for each layer, with the layer's value in each step or None."""
    values = np.array([[np.nan if v is None else v for v in row] for row in ranges["maximum"]], dtype=float)
    values[values <= 0] = np.nan
    names, count = ranges["layers"], len(ranges["layers"])
    with _drawing(1.2 + min(6.0, 0.1 * max(count, 14))) as (figure, axes):
        axes.grid(False)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        image = axes.imshow(
            values, aspect="auto", interpolation="none", cmap="viridis", norm=LogNorm(low, max(high, low * 1.01))
        )
        bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02)
        bar.set_label("largest |input|")
        bar.ax.xaxis.set_major_locator(_locator(low, high))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # one picture instead of 256 shapes
        bar.outline.set_visible(False)
        _name_rows(axes, names)
        ticks = list(range(0, len(ranges["steps"]), max(1, -(-len(ranges["steps"]) // 8))))
        axes.set_xticks(ticks, [str(ranges["steps"][index]) for index in ticks])
        axes.set_xlabel("denoising step")
        words = f"Largest input of {count} layers over {len(ranges['steps'])} steps, from {low:.3g} to {high:.3g}"
        return _svg(figure, "heat", words)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Labels the rows of the heat map with the blocks of their layers, such as transformer_blocks.3: one label for all
    consecutive layers of a block, and a line between two blocks. `names` has the name of the layer of each row."""
    runs: list[tuple[str, int, int]] = []  # block, first row, last row
    for row, name in enumerate(names):
        block = _block(name)
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1], row)
        else:
            runs.append((block, row, row))
    if len(runs) > 30:  # too many labels for the height of the figure
        runs = [run for run in runs if run[2] > run[1]] or runs[:: len(runs) // 30 + 1]
    # a label one row below the one before would overlap it
    labelled = [run for index, run in enumerate(runs) if index == 0 or run[2] - runs[index - 1][2] > 1]
    axes.set_yticks([(first + last) / 2 for _, first, last in labelled], [run[0] for run in labelled], fontsize=8)
    axes.tick_params(axis="y", length=0)
    for _, first, _ in runs[1:]:
        axes.axhline(first - 0.5, color="#ffffff", linewidth=0.5, alpha=0.6)


def _block(name: str) -> str:
    """Returns the name of a layer's block: transformer_blocks.3 for transformer_blocks.3.attn.to_q, proj_out for
    proj_out."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.partition(".")[0]


def figure_or_none(draw: Callable[..., str], *content: Any) -> str | None:
    """Returns the figure that `draw` makes of `content`, or None if one of the values in `content` is empty or None."""
    return draw(*content) if all(content) else None
