"""Prints what a user sees: progress, one-line errors, interruptions. Only this package prints."""

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from octavo.capture.errors import OctavoError, storage_error
from octavo.capture.progress import Reports, line
from octavo.capture.progress import size as size  # for those who print with a Terminal
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
        text = str(error)
        if not isinstance(error, OctavoError):
            text = f"{type(error).__name__}: {text}. Run again with --debug and report it."
        where = f"rank {ranks.rank}: " if ranks.world > 1 else ""
        _end(ranks, error.exit_code if isinstance(error, OctavoError) else 1, f"Error: {where}{text}")
    finally:
        ranks.close()


def _end(ranks: Ranks, code: int, text: str) -> None:
    if ranks.world > 1:  # the launcher is about to end those that are left
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
    first = ranks.failed(code)
    if first.rank == ranks.rank:
        show(" ".join(text.split()), err=True)
    sys.exit(first.code)


# control characters, line separators, surrogates, and what overrides the direction of a line (Unicode Annex 9)
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with escapes in the place of what would control a terminal or reorder what it shows, such as \\x1b.

    Names and words come from files of others: control characters, line separators, lone surrogates and the characters
    that override the direction of a line.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def show(text: str, err: bool = False) -> None:
    """Prints one line, on stderr if it can be. Raises StorageError where stdout is a file that cannot be written."""
    _draw(printable(text), err)


def _draw(text: str, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        if not err:
            raise
    except OSError as error:
        if not err:
            silence()
            raise storage_error(Path("standard output"), error) from error


def prepare_streams() -> None:
    """Lets lines be printed whatever the standard streams are: characters that an encoding lacks become question marks,
    and no file that is opened takes the number of a closed stream."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def pipes() -> Iterator[None]:
    """Inside, a pipe whose reader has gone ends the process as it ends other tools: in silence, by SIGPIPE's code."""
    try:
        yield
    except BrokenPipeError:
        silence()
        sys.exit(128 + signal.SIGPIPE)


@contextmanager
def parsing() -> Iterator[None]:
    """Inside, where click parses arguments and prints help, stdout that cannot be written ends the process as it does
    in a command."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence()
        failure = storage_error(Path("standard output"), error)
        show(f"Error: {failure}", err=True)
        sys.exit(failure.exit_code)


def silence() -> None:
    """Leads what stdout still holds to nowhere: Python would try to write it once more at its end."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


class Terminal:
    """Lines for people, or with `as_json` one JSON object a line for programs; both on stdout.

    One that is `quiet`, as those of all ranks but the first are, shows only what is its own to tell (`own`).
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._reports = Reports(self._report)

    def say(self, text: str) -> None:
        """A line for people."""
        if not (self.as_json or self.quiet):
            show(text)

    def warn(self, text: str, own: bool = False) -> None:
        """A warning: on stderr, in both forms."""
        if own or not self.quiet:
            show(f"Warning: {text}", err=True)

    def event(self, kind: str, own: bool = False, **values: Any) -> None:
        """A line for programs."""
        if self.as_json and (own or not self.quiet):
            text = json.dumps({"event": kind, **values}, sort_keys=True, allow_nan=False)
            _draw(text.replace("\x7f", "\\u007f"))  # the one control character that json leaves as it is

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table for people; columns of numbers stand right. Where a row would be wider than the terminal, its cells
        follow each other in lines of their own."""
        if self.as_json or self.quiet or not rows:
            return
        from rich.console import Console

        from .tables import drawn_table, listed

        title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
        console = Console(width=None if _is_terminal(sys.stdout) or "COLUMNS" in os.environ else 120)
        text = listed(title, columns, rows, console.width) or drawn_table(title, columns, rows, console)
        _draw(text)

    def progress(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """`items`, with their progress on stderr while they are taken: on a terminal a moving bar, else a line now and
        then. With `as_json` an event takes the place of the line."""
        if self.quiet:
            yield from items
        elif self.as_json or not _is_terminal(sys.stderr):
            yield from self._reports(label, items, total)
        else:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import track

            console = Console(stderr=True)
            yield from track(items, escape(printable(label)), total, console=console, transient=True)

    def _report(self, label: str, done: int, total: int | None, left: float | None) -> None:
        self.event("progress", label=label, done=done, total=total, seconds_left=left if left is None else round(left))
        if not self.as_json:
            show(line(label, done, total, left), err=True)

    @contextmanager
    def bars(self, label: str, total: int, steps: int) -> Iterator[Callable[[int, int], None]]:
        """A pair of bars, over `total` prompts and the `steps` of one; what is yielded sets (prompt, step).

        Without a terminal there is a line now and then, or with `as_json` an event.
        """
        if self.quiet:
            yield lambda prompt, step: None
            return
        if self.as_json or not _is_terminal(sys.stderr):
            began, of_one = time.monotonic(), max(1, steps)
            yield lambda prompt, step: self._reports.due(
                label, prompt, total, began, (prompt * of_one + step) / (total * of_one)
            )
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            outer, inner = shown.add_task(label, total=total), shown.add_task("steps", total=steps or None)

            def move(prompt: int, step: int) -> None:
                shown.update(outer, completed=prompt)
                shown.update(inner, completed=step)

            yield move


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()
