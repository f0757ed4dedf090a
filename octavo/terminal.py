"""Prints what a user sees: progress, one-line errors, interruptions. Only this package prints."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from octavo.capture.errors import OctavoError
from octavo.capture.ranks import ALONE, Ranks

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME = 1.0  # seconds: a launcher passes on the signal that the terminal has sent to all


class Interrupted(BaseException):
    """A signal asked this process to end; `exit_code` is the shell's for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.note = "Interrupted."


@contextmanager
def interruptible(launched: bool = False) -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises Interrupted; the second one ends the process at once.

    Where a launcher may pass the first one on, `launched`, it comes twice.
    """

    def heard(number: int, frame: FrameType | None) -> None:
        until = time.monotonic() + _SAME if launched else 0.0

        def again(number: int, frame: FrameType | None) -> None:
            if time.monotonic() > until:
                os._exit(128 + number)

        for name in _SIGNALS:
            signal.signal(name, again)
        raise Interrupted(number)

    before = {number: signal.signal(number, heard) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors(debug: bool, ranks: Ranks = ALONE) -> Iterator[None]:
    """Ends the process with one line on stderr and the exit code of the error; a traceback only with `debug`.

    Of several processes the first one that fails says so, and all end with its code.
    """
    try:
        with interruptible(ranks.world > 1):
            yield
    except Interrupted as stop:
        _end(ranks, stop.exit_code, stop.note)
    except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
        ranks.failed(1)
        raise
    except Exception as error:
        if debug:
            ranks.failed(1)
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, OctavoError):
            text = f"{type(error).__name__}: {text}. Run again with --debug and report it."
        where = f"rank {ranks.rank}: " if ranks.world > 1 else ""
        _end(ranks, error.exit_code if isinstance(error, OctavoError) else 1, f"Error: {where}{text}")
    finally:
        ranks.close()


def _end(ranks: Ranks, code: int, line: str) -> None:
    if ranks.world > 1:  # the launcher is about to end those that are left
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
    first = ranks.failed(code)
    if first.rank == ranks.rank:
        click.echo(line, err=True)
    sys.exit(first.code)


class Terminal:
    """Lines for people, or with `as_json` one JSON object a line for programs; both on stdout.

    One that is `quiet`, as those of all ranks but the first are, shows only what is its own to tell (`own`).
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def say(self, text: str) -> None:
        """A line for people."""
        if not (self.as_json or self.quiet):
            click.echo(text)

    def warn(self, text: str, own: bool = False) -> None:
        """A warning: on stderr, in both forms."""
        if own or not self.quiet:
            click.echo(f"Warning: {text}", err=True)

    def event(self, kind: str, own: bool = False, **values: Any) -> None:
        """A line for programs."""
        if self.as_json and (own or not self.quiet):
            click.echo(json.dumps({"event": kind, **values}, sort_keys=True, allow_nan=False))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table for people; columns of numbers stand right."""
        if self.as_json or self.quiet or not rows:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", header_style="bold")
        for column, cells in zip(columns, zip(*rows, strict=True), strict=False):
            number = all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 120).print(table)

    def progress(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """`items`, with a bar while they are taken: on a terminal a moving one, else nothing."""
        if self.as_json or self.quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total, console=Console(stderr=True), transient=True)

    @contextmanager
    def bars(self, label: str, total: int, steps: int) -> Iterator[Callable[[int, int], None]]:
        """A pair of bars, over `total` prompts and the `steps` of one; what is yielded sets (prompt, step)."""
        if self.as_json or self.quiet or not sys.stderr.isatty():
            yield lambda prompt, step: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            outer, inner = shown.add_task(label, total=total), shown.add_task("steps", total=steps or None)

            def show(prompt: int, step: int) -> None:
                shown.update(outer, completed=prompt)
                shown.update(inner, completed=step)

            yield show


def size(count: float) -> str:
    """Bytes in words: 10.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds in words: 43 s, 5 min 10 s, 2 h 4 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
