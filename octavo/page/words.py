"""Numbers as people read them."""

from markupsafe import Markup

from ..terminal import size


def decibels(value: float | None) -> str:
    """36.3 dB; None is a difference of zero."""
    return "no difference" if value is None else f"{value:.1f} dB"


def share(value: float) -> str:
    """A part of one in percent: 12 %, 1.2 %, 0.034 %."""
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def factor(value: float) -> str:
    """How many times as much: 3.2 x."""
    return f"{value:.2f}\u00a0×" if value < 10 else f"{value:.0f}\u00a0×"


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
    "decibels": decibels, "share": share, "factor": factor, "number": number, "extent": extent, "shape": shape,
    "size": size, "said": said, "breakable": breakable,
}  # fmt: skip
