"""What a user sees: progress, one-line errors, interruptions. Only this package prints."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked this process to end; `exit_code` is the shell's for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.note = "Interrupted."


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises Interrupted; the second one ends the process at once."""

    def heard(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, lambda again, _: os._exit(128 + again))
        raise Interrupted(number)

    before = {number: signal.signal(number, heard) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Ends the process with one line on stderr and the exit code of the error; a traceback only with `debug`."""
    try:
        with interruptible():
            yield
    except Interrupted as stop:
        click.echo(stop.note, err=True)
        sys.exit(stop.exit_code)
    except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        code = getattr(error, "exit_code", None)
        text = " ".join(str(error).split())
        if code is None:
            text = f"{type(error).__name__}: {text}. Run again with --debug and report it."
        click.echo(f"Error: {text}", err=True)
        sys.exit(code if code is not None else 1)


class Terminal:
    """Lines for people, or with `as_json` one JSON object a line for programs; both on stdout."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.as_json:
            click.echo(text)

    def warn(self, text: str) -> None:
        """A warning: on stderr, in both forms."""
        click.echo(f"Warning: {text}", err=True)

    def event(self, kind: str, **values: Any) -> None:
        """A line for programs."""
        if self.as_json:
            click.echo(json.dumps({"event": kind, **values}, sort_keys=True, allow_nan=False))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table for people; columns of numbers stand right."""
        if self.as_json or not rows:
            return
        from rich.console import Console
        from rich.table import Table

        made = Table(title=title, title_justify="left", header_style="bold")
        for column, cells in zip(columns, zip(*rows, strict=True), strict=False):
            number = all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)
            made.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            made.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 120).print(made)

    def progress(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """`items`, with a bar while they are taken: on a terminal a moving one, else nothing."""
        if self.as_json or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total, console=Console(stderr=True), transient=True)

    @contextmanager
    def bars(self, label: str, total: int, steps: int) -> Iterator[Callable[[int, int], None]]:
        """A pair of bars, over `total` prompts and the `steps` of one; what is yielded sets (prompt, step)."""
        if self.as_json or not sys.stderr.isatty():
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
