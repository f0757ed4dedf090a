"""Sizes in bytes, as a user writes them (16GiB) and as messages show them."""

import math
import re

from octavo.capture.errors import UsageError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


SIZE_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")


def parse_size(text: str, option: str) -> float:
    """The bytes of a size such as 16GiB. Raises UsageError, naming `option`, for other text."""
    match = SIZE_FORM.fullmatch(text.strip())
    if match is None or match[2] not in UNITS or not float(match[1]) > 0:
        raise UsageError(f"{option} '{text}': not a size. Write 16GiB, with one of {', '.join(UNITS)}.")
    return float(match[1]) * UNITS[match[2]]


def size(count: float) -> str:
    """Bytes as text, rounded up to a tenth of a unit, so that the text given as a limit suffices."""
    unit = next((word for word in ("GiB", "MiB", "KiB") if count >= UNITS[word]), "B")
    amount = math.ceil(10 * count / UNITS[unit]) / 10
    return f"{amount:g}{unit}"
