"""Prints everything that a user sees: lines, tables, progress, one-line errors and interruptions.

Only the command line prints; the other packages log or raise.
"""

import io
import json
import os
import re
import shlex
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
from octavo.capture.progress import size as size  # the commands import it from here
from octavo.capture.ranks import ALONE, Ranks

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME = 1.0  # seconds in which a second signal counts as the first one, passed on by a launcher


class Interrupted(BaseException):
    """Raised when a signal asks this process to end. `exit_code` is 128 plus the signal's number, as in a shell; `note`
    is the line to print."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.note = "Interrupted."


@contextmanager
def interruptible(launched: bool = False) -> Iterator[None]:
    """Makes the first SIGINT, SIGTERM or SIGHUP that arrives in the body of `with` raise Interrupted; a second signal
    ends the process at once.

    `launched` says that a launcher, such as torchrun, started the process. Such a process may get one signal twice,
    from the terminal and from the launcher, so it ignores further signals for one second after the first.
    """

    def on_first(number: int, frame: FrameType | None) -> None:
        ignored_until = time.monotonic() + _SAME if launched else 0.0

        def on_second(number: int, frame: FrameType | None) -> None:
            if time.monotonic() > ignored_until:
                os._exit(128 + number)

        for name in _SIGNALS:
            signal.signal(name, on_second)
        raise Interrupted(number)

    before = {number: signal.signal(number, on_first) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors(debug: bool, ranks: Ranks = ALONE) -> Iterator[None]:
    """Ends the process when an exception leaves the body of `with`: prints one line on stderr, and exits with the
    `exit_code` of an OctavoError, or 1 for another exception. With `debug` the exception is raised instead, so that
    Python prints a traceback.

    If several processes (`ranks`) run, only the first process that fails prints its error, and all exit with its exit
    code.
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
            text = f"{type(error).__name__}: {text}. Run again with --debug, and report the traceback."
        where = f"rank {ranks.rank}: " if ranks.world > 1 else ""
        _end(ranks, error.exit_code if isinstance(error, OctavoError) else 1, f"Error: {where}{text}")
    finally:
        ranks.close()


def _end(ranks: Ranks, code: int, text: str) -> None:
    """Announces to the other ranks that this process failed with the exit code `code`, and exits. All processes exit
    with the exit code of the first that failed, and only this first one prints its `text`."""
    if ranks.world > 1:  # the launcher will soon send signals to the other processes
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
    first = ranks.failed(code)
    if first.rank == ranks.rank:
        show(" ".join(text.split()), err=True)
    sys.exit(first.code)


# control characters, line separators, surrogates, and the characters that set the direction of a line (Unicode Annex 9)
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns a text that is safe to print: characters that control a terminal or reorder its text become escapes, such
    as \\x1b.

    Names in files from elsewhere may hold such characters: control characters, line separators, lone surrogates, and
    characters that set the direction of a line.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def show(text: str, err: bool = False) -> None:
    """Prints `text` as one line on stdout, or with `err` on stderr.

    Raises StorageError if stdout is a file that cannot be written. If stderr cannot be written, the line is lost.
    """
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
    """Prepares stdin, stdout and stderr of this process for printing.

    Characters that the encoding of a stream lacks are printed as question marks. If one of the three is closed, its
    file descriptor (0, 1 or 2) is opened on /dev/null, so that no file that is opened later gets this number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def pipes() -> Iterator[None]:
    """Ends the process if the body of `with` prints into a pipe that nobody reads: without a message and with the exit
    code of SIGPIPE, as other command line tools do."""
    try:
        yield
    except BrokenPipeError:
        silence()
        sys.exit(128 + signal.SIGPIPE)


@contextmanager
def parsing() -> Iterator[None]:
    """Handles a failure to write to stdout while click parses arguments and prints help, in the body of `with`. Prints
    one line on stderr, and ends the process with the exit code of StorageError."""
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
    """Sends what stdout has in its buffer to /dev/null, after stdout could not be written. Otherwise Python would try
    to write the buffer again when the process exits, and print an error."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


class Terminal:
    """Prints the output of a command on stdout: lines for people, or with `as_json` one JSON object per line for
    programs.

    If several processes run, the terminals of all but the first are `quiet`: they print only what is passed with
    `own=True`, because it concerns one process alone.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._reports = Reports(self._report)

    def say(self, text: str) -> None:
        """Prints a line for people; nothing with --json."""
        if not (self.as_json or self.quiet):
            show(text)

    def next(self, *words: object) -> None:
        """Prints which command of Octavo to type next, for people; nothing with --json. `words` are its arguments,
        which are quoted for a shell where needed."""
        self.say(f"Next: {shlex.join(['octavo', *map(str, words)])}")

    def warn(self, text: str, own: bool = False) -> None:
        """Prints a warning on stderr, with and without --json. If several processes run, only the first prints it; with
        `own`, every process does."""
        if own or not self.quiet:
            show(f"Warning: {text}", err=True)

    def event(self, kind: str, own: bool = False, **values: Any) -> None:
        """Prints a JSON object of `values`, with `kind` under the key "event"; without --json, prints nothing. If
        several processes run, only the first prints it; with `own`, every process does."""
        if self.as_json and (own or not self.quiet):
            text = json.dumps({"event": kind, **values}, sort_keys=True, allow_nan=False)
            _draw(text.replace("\x7f", "\\u007f"))  # the only control character that json.dumps does not escape

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table for people; nothing with --json or without rows.

        Columns of numbers are aligned right. If a row is wider than the terminal, the table is printed as a list of its
        rows.
        """
        if self.as_json or self.quiet or not rows:
            return
        from rich.console import Console

        from .tables import grid_text, list_text

        title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
        console = Console(width=None if _is_terminal(sys.stdout) or "COLUMNS" in os.environ else 120)
        text = list_text(title, columns, rows, console.width) or grid_text(title, columns, rows, console)
        _draw(text)

    def progress(
        self, label: str, items: Iterable[T], total: int | None = None, note: Callable[[], str] = str
    ) -> Iterator[T]:
        """Yields `items`, and shows under the name `label` how many were yielded, of `total` if it is known: on a
        terminal as a bar on stderr, otherwise as a line on stderr about every 30 seconds. With --json, events on stdout
        take the place of bar and lines. If several processes run, only the first shows its progress. `note`
        returns a further text to show, "" for none."""
        if self.quiet:
            yield from items
        elif self.as_json or not _is_terminal(sys.stderr):
            yield from self._reports(label, items, total, note)
        else:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress, TextColumn

            columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(escape(printable(label)), total=total, note="")
                for item in items:
                    yield item
                    bar.update(task, advance=1, note=escape(printable(note())))

    def _report(self, label: str, done: int, total: int | None, left: float | None, note: str) -> None:
        further: dict[str, Any] = {"note": note} if note else {}
        seconds = left if left is None else round(left)
        self.event("progress", label=label, done=done, total=total, seconds_left=seconds, **further)
        if not self.as_json:
            show(line(label, done, total, left, note), err=True)

    @contextmanager
    def bars(self, label: str, total: int, steps: int) -> Iterator[Callable[[int, int], None]]:
        """Shows two progress bars on stderr, named `label`, inside the `with` statement: one over `total` prompts, one
        over the `steps` of a prompt.

        Yields a function that moves the bars; its arguments are the number of finished prompts, and the number of
        finished steps of the current prompt. Without a terminal, about every 30 seconds a line on stderr is printed
        instead of the bars; with --json, an event on stdout. If several processes run, only the first shows its
        progress.
        """
        if self.quiet:
            yield lambda prompt, step: None
            return
        if self.as_json or not _is_terminal(sys.stderr):
            began, steps = time.monotonic(), max(1, steps)
            yield lambda prompt, step: self._reports.due(
                label, prompt, total, began, (prompt * steps + step) / (total * steps)
            )
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            outer, inner = bars.add_task(label, total=total), bars.add_task("steps", total=steps or None)

            def move(prompt: int, step: int) -> None:
                bars.update(outer, completed=prompt)
                bars.update(inner, completed=step)

            yield move


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def count_of(count: int, noun: str) -> str:
    """Returns the text of `count` and `noun`, with an s unless `count` is 1: 1 prompt, 8 prompts."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
