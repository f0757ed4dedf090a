"""Reports progress in lines, where no bar can move: at most one in 30 seconds."""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
EVERY = 30.0  # seconds between two reports, at least: a log of a run of an hour has at most 120 lines


class Report(Protocol):
    """Takes a report: what is done, how many items of how many (None: unknown), and the seconds that are left."""

    def __call__(self, label: str, done: int, total: int | None, left: float | None, /) -> None: ...


class Reports:
    """The reports of one run, whatever its stages: `every` seconds pass between two of them."""

    def __init__(self, report: Report, every: float = EVERY) -> None:
        self._report, self._every, self._last = report, every, time.monotonic()

    def __call__(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """`items`; before one is taken a report is made, if one is due."""
        began = time.monotonic()
        for done, item in enumerate(items):
            self.due(label, done, total, began, done / total if total else 0.0)
            yield item

    def due(self, label: str, done: int, total: int | None, began: float, share: float) -> None:
        """Makes a report if one is due; `share` of the work has been done since the time `began`."""
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._report(label, done, total, (now - began) * (1 / share - 1) if share else None)


def line(label: str, done: int, total: int | None, left: float | None) -> str:
    """A report in words: "freeze: 12 of 48, about 3 min 10 s left"."""
    count = f"{done} of {total}" if total is not None else f"{done} done"
    return f"{label}: {count}" + ("" if left is None else f", about {duration(left)} left")


def duration(seconds: float) -> str:
    """Seconds in words: 43 s, 5 min 10 s, 2 h 4 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes in words: 10.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
