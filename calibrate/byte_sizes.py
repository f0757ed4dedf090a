"""Reads numbers of bytes that a user writes, such as 16GiB, and writes them for messages."""

import math
import re

from octavo.capture.errors import UsageError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


SIZE_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")


def parse_size(text: str, option: str) -> float:
    """Returns the number of bytes that a text such as 16GiB means. Raises UsageError, naming `option`, unless `text` is
    a positive number and a unit of UNITS (B, KB, MB, GB, KiB, MiB, GiB)."""
    match = SIZE_FORM.fullmatch(text.strip())
    if match is None or match[2] not in UNITS or not float(match[1]) > 0:
        raise UsageError(
            f"{option}: '{text}' is not a size. Write a number and a unit ({', '.join(UNITS)}), as in 16GiB."
        )
    return float(match[1]) * UNITS[match[2]]


def size(count: float) -> str:
    """Writes `count` bytes as text, such as 1.5GiB, rounded up to a tenth of a unit, so that a user who passes the text
    as a limit allows at least that many bytes."""
    unit = next((word for word in ("GiB", "MiB", "KiB") if count >= UNITS[word]), "B")
    amount = math.ceil(10 * count / UNITS[unit]) / 10
    return f"{amount:g}{unit}"
