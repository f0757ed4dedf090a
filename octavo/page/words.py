"""Numbers as people read them."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..terminal import size


def decibels(value: float | None) -> str:
    """36.3 dB; None is a difference of zero."""
    return "no difference" if value is None else f"{value:.1f} dB"


def share(value: float) -> str:
    """A part of one in percent: 12 %, 1.2 %, 0.034 %."""
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def quicker(ratio: float) -> str:
    """A float time over an int8 time, in words: 1.7 x slower for 0.58, 3.2 x faster for 3.2."""
    return _times(ratio, "faster", "slower", "as fast")


def smaller(ratio: float) -> str:
    """A float size over an int8 size, in words: 1.9 x smaller."""
    return _times(ratio, "smaller", "larger", "as large")


def _times(ratio: float, more: str, less: str, same: str) -> str:
    """`same` for a ratio that is 1.0 when rounded."""
    if round(ratio, 1) == 1.0:
        return same
    times = max(ratio, 1 / ratio)
    return f"{times:.{1 if times < 10 else 0}f}\u00a0× {more if ratio > 1 else less}"


# the PSNR of pictures in dB from which on these words hold: a rule of thumb of this page, not a measurement of eyes
_CLOSENESS = (
    (40.0, "look like the float ones"),
    (30.0, "differ from the float ones in small details"),
    (20.0, "differ visibly from the float ones"),
    (float("-inf"), "are other pictures than the float ones"),
)


def verdict(content: Mapping[str, Any]) -> str:
    """The findings of a comparison in a few sentences: the pictures, size and speed, and whether a limit was missed."""
    totals, shown = content["totals"], "pictures" if content["decoded"] else "latents, as shown,"
    psnr, judged, speed = totals["psnr"], totals["judged"], totals["speed"]
    if psnr is None:
        found = f"The int8 {shown} are those of float"
    else:
        close = next(words for bar, words in _CLOSENESS if psnr >= bar)
        found = f"The int8 {shown} {close} (PSNR {decibels(psnr)})"
    if judged:
        found += f"; {judged['int8']} of {judged['of']} show what the prompt says, {judged['float']} in float"
    size_ = smaller(totals["size"]["float"] / totals["size"]["int8"])
    found += f". int8 is {size_} and {quicker(speed['ratio'])} here."
    missed = [gate["name"] for gate in content["gates"] if not gate["passed"]]
    if missed:
        return f"Missed: {' and '.join(missed)}. {found}"
    return f"Passed. {found}" if content["gates"] else f"{found} No limit was set (--min-psnr, --min-sqnr)."


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def extent(value: list[float] | float) -> str:
    """The smallest and the largest of several numbers."""
    if not isinstance(value, list):
        return number(value)
    low, high = min(value), max(value)
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def shape(value: list[int]) -> str:
    """160 × 640."""
    return " × ".join(map(str, value))


def said(value: object) -> str:
    """A setting."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {said(each)}" for name, each in value.items())
    return ", ".join(map(said, value)) if isinstance(value, (list, tuple)) else str(value)


def breakable(name: str) -> Markup:
    """A dotted name that a narrow page may break after its dots."""
    return Markup(".<wbr>").join(name.split("."))


FILTERS = {
    "decibels": decibels, "share": share, "smaller": smaller, "quicker": quicker, "verdict": verdict, "number": number,
    "extent": extent, "shape": shape, "size": size, "said": said, "breakable": breakable,
}  # fmt: skip
