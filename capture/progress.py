"""Reports progress as lines of text, at most one in 30 seconds, where a progress bar cannot be shown."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
EVERY = 30.0  # least seconds between two reports, so that an hour adds at most 120 lines to a log


class Report(Protocol):
    """A function that shows the progress of the task `label`.

    `done` of `total` items are done; `total` is None if unknown. `remaining` is the estimate of the seconds left, or
    None. `note` is a further text, often "".
    """

    def __call__(self, label: str, done: int, total: int | None, remaining: float | None, note: str, /) -> None: ...


class Reports:
    """Reports the progress of all tasks of one run with `report`, at most once in `every` seconds."""

    def __init__(self, report: Report, every: float = EVERY) -> None:
        self._report, self._every, self._last = report, every, time.monotonic()

    def __call__(
        self, label: str, items: Iterable[T], total: int | None = None, note: Callable[[], str] = str
    ) -> Iterator[T]:
        """Yields `items`. Before each item, reports the progress if the last report was at least `every` seconds ago;
        `every` is an argument of `Reports`.

        `label` names the task in the reports; `total` is the number of items, None if unknown. `note` returns a further
        text for a report.
        """
        began = time.monotonic()
        for done, item in enumerate(items):
            self.due(label, done, total, began, done / total if total else 0.0, note)
            yield item

    def due(
        self, label: str, done: int, total: int | None, began: float, share: float, note: Callable[[], str] = str
    ) -> None:
        """Reports the progress of the task `label`, of which `done` of `total` items are finished, if the last report
        was at least `every` seconds ago.

        `began` is a time by time.monotonic, and `share`, 0 to 1, the part of the task that was done since then. These
        two give the estimate of the seconds left. `note` returns a further text for the report.
        """
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._report(label, done, total, (now - began) * (1 / share - 1) if share else None, note())


def line(label: str, done: int, total: int | None, remaining: float | None, note: str = "") -> str:
    """Formats a report as text, such as "freeze: 12 of 48, about 3 min 10 s left": the task `label`, how many of its
    `total` items are `done`, the `remaining` seconds, and after a semicolon `note`. A `total` or `remaining` of None,
    which means unknown, is left out, and so is an empty `note`."""
    count = f"{done} of {total}" if total is not None else f"{done} done"
    left = "" if remaining is None else f", about {duration(remaining)} left"
    return f"{label}: {count}{left}" + (f"; {note}" if note else "")


def duration(seconds: float) -> str:
    """Formats seconds as text, such as 43 s, 5 min 10 s or 2 h 4 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Formats a number of bytes as text, such as 10.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
