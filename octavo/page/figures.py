"""Figures as SVG that is part of the page: its text is text, its colours are the page's, its bytes depend on the data
alone."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

# what is drawn in the colours on the left has the page's on the right, light or dark
INK, LINE, SERIES, MARK = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {INK: "currentColor", LINE: "var(--line)", SERIES: "var(--accent)", MARK: "var(--warn)"}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "octavo", "text.parse_math": False, "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINE,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.8, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
_WIDTH = 4.5  # inches: at the width of a phone, text of 10 points is still read


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an element; `name` keeps its ids apart from those of others, `words` say what it shows."""
    made = io.StringIO()
    figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = made.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in _COLOURS.items():
        text = text.replace(drawn, shown)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{words}">', text, count=1)
    return re.sub(r">\s+<", "><", text).strip()


def _count(axes: Axes, last: int) -> None:
    """Whole numbers from 1 along the horizontal axis."""
    axes.set_xlim(0.5 if last < 10 else 0, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _locator(low: float, high: float) -> Locator:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or where fewer than two of those fit, any number."""
    locator = LogLocator(subs=(1.0, 2.0, 5.0), numticks=12)
    fitting = [value for value in locator.tick_values(low, max(high, low * 1.01)) if low <= value <= high]
    return locator if len(fitting) > 1 else MaxNLocator(4)


def trajectory(steps: Sequence[Mapping[str, float]]) -> str:
    """The relative error of the latents after each step: the median over prompts, and from smallest to largest."""
    with _drawing(2.5) as (figure, axes):
        at = range(1, len(steps) + 1)
        low, mid, high = ([100 * step[key] for step in steps] for key in ("smallest", "median", "largest"))
        axes.fill_between(at, low, high, color=SERIES, alpha=0.2, linewidth=0)
        axes.plot(at, mid, color=SERIES, marker="o" if len(steps) < 3 else None)
        if min(low) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_locator(min(low), max(high)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        _count(axes, len(steps))
        axes.set_xlabel("denoising step")
        axes.set_ylabel("error of the latents")
        return _svg(figure, "trajectory", f"Relative error of the latents over {len(steps)} denoising steps")


def by_step(values: Sequence[Mapping[str, Any]]) -> str:
    """The SQNR of the denoiser's output in each step, for the same inputs."""
    with _drawing(2.5) as (figure, axes):
        steps = [row["step"] for row in values]
        axes.plot(steps, [row["sqnr"] for row in values], color=SERIES, marker="o", markersize=3)
        _count(axes, max(steps))
        axes.set_xlabel("denoising step")
        axes.set_ylabel("output SQNR, dB")
        return _svg(figure, "steps", f"Output SQNR over {len(values)} denoising steps")


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """The SQNR of each quantized layer in the order of the network, the worst three named."""
    known = [row for row in rows if row.get("sqnr") is not None]
    with _drawing(2.6) as (figure, axes):
        heights = [row["sqnr"] for row in known]
        worst = sorted(range(len(known)), key=lambda at: (heights[at], at))[:3]
        axes.scatter(range(1, len(known) + 1), heights, s=16, color=SERIES, linewidths=0)
        axes.scatter([at + 1 for at in worst], [heights[at] for at in worst], s=26, color=MARK, linewidths=0)
        _count(axes, len(known))
        axes.set_xlabel("quantized layer, from input to output")
        axes.set_ylabel("SQNR, dB")
        return _svg(figure, "layers", f"SQNR of {len(known)} layers, from {min(heights)} to {max(heights)} dB")


def heat(ranges: Mapping[str, Any]) -> str:
    """The largest |input| of each layer in each step, in logarithmic colours."""
    values = np.array([[np.nan if v is None else v for v in row] for row in ranges["maximum"]], dtype=float)
    values[values <= 0] = np.nan
    names, count = ranges["layers"], len(ranges["layers"])
    with _drawing(1.2 + min(6.0, 0.1 * max(count, 14))) as (figure, axes):
        axes.grid(False)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        shown = axes.imshow(
            values, aspect="auto", interpolation="none", cmap="viridis", norm=LogNorm(low, max(high, low * 1.01))
        )
        bar = figure.colorbar(shown, ax=axes, location="top", aspect=40, pad=0.02)
        bar.set_label("largest |input|")
        bar.ax.xaxis.set_major_locator(_locator(low, high))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # 256 shapes else
        bar.outline.set_visible(False)
        _name_rows(axes, names)
        places = list(range(0, len(ranges["steps"]), max(1, -(-len(ranges["steps"]) // 8))))
        axes.set_xticks(places, [str(ranges["steps"][at]) for at in places])
        axes.set_xlabel("denoising step")
        words = f"Largest input of {count} layers over {len(ranges['steps'])} steps, from {low:.3g} to {high:.3g}"
        return _svg(figure, "heat", words)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A tick for each run of layers in the same block, such as transformer_blocks.3, and lines between them."""
    runs: list[tuple[str, int, int]] = []
    for at, name in enumerate(names):
        block = _block(name)
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1], at)
        else:
            runs.append((block, at, at))
    if len(runs) > 30:
        runs = [run for run in runs if run[2] > run[1]] or runs[:: len(runs) // 30 + 1]
    apart = [run for at, run in enumerate(runs) if at == 0 or run[2] - runs[at - 1][2] > 1]  # else they overlap
    axes.set_yticks([(first + last) / 2 for _, first, last in apart], [run[0] for run in apart], fontsize=8)
    axes.tick_params(axis="y", length=0)
    for _, first, _ in runs[1:]:
        axes.axhline(first - 0.5, color="#ffffff", linewidth=0.5, alpha=0.6)


def _block(name: str) -> str:
    """The block of a layer: transformer_blocks.3 for transformer_blocks.3.attn.to_q, proj_out for proj_out."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.partition(".")[0]


def drawn(draw: Callable[..., str], *content: Any) -> str | None:
    """A figure, None where there is nothing to draw."""
    return draw(*content) if all(content) else None
