"""Checks how commands end (signals, a dead worker, closed streams, a full disk) and what they print."""

import datetime
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from octavo.capture.errors import OctavoError
from octavo.capture.progress import Reports
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter
from octavo.cli import main
from octavo.tables import grid_text, list_text
from octavo.terminal import Interrupted, Terminal, errors, interruptible, prepare_streams, printable

from ..helpers.commands import capture
from ..helpers.examples import examples, some_of
from ..helpers.faults import counting, fast_path, in_child
from ..helpers.ranked import printing
from ..helpers.refusals import refused
from ..helpers.stores import MANIFEST, fill, holds, info_of

__all__ = ["fast_path"]

UNITS = 2


def session(directory: Path) -> None:
    with CaptureWriter.create(directory, MANIFEST | {"prompts": UNITS}, resume=True) as writer:
        fill(writer, range(UNITS))
        writer.complete()


def interrupt_twice() -> None:
    """Interrupts this process, and again before it can tidy up."""
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)


def test_a_second_interruption_ends_at_once_wherever_the_store_is(fast_path: Path) -> None:
    with counting() as calls:
        session(fast_path / "whole")
    leftovers = 0
    for index in some_of(len(calls.names)):
        store = fast_path / str(index)

        def interrupted(index: int = index, store: Path = store) -> None:
            with interruptible(), counting(index, interrupt_twice):
                session(store)

        assert in_child(interrupted) == 130
        leftovers += any(store.rglob(".staging-*"))
        before = {path: (path / "unit.json").read_bytes() for path in store.glob("units/0*")}
        session(store)
        assert holds(store, UNITS)
        assert before == {path: path.joinpath("unit.json").read_bytes() for path in before}
        assert not list(store.rglob(".*"))
    assert leftovers  # the process did not stay to remove its temporary files


def test_a_signal_that_a_launcher_passes_on_is_no_second_one() -> None:
    def interrupted() -> None:
        with pytest.raises(Interrupted), interruptible(launched=True):
            interrupt_twice()

    assert in_child(interrupted) == 0


def test_a_worker_that_outlives_its_capture_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    gone, alive = os.pipe()

    def killed() -> None:
        writer = CaptureWriter.create(tmp_path, MANIFEST | {"prompts": UNITS})
        with writer.unit(0, info_of(0)):
            if os.fork() == 0:  # keeps the capture's lock until `theirs` is closed
                os.close(theirs)
                os.read(ours, 1)
                os.closerange(3, alive)
                os.closerange(alive + 1, 4096)
            os._exit(9)

    assert in_child(killed) == 9
    with pytest.raises(OctavoError, match="in use by pid ") as caught:
        session(tmp_path)
    assert caught.value.exit_code == 5
    os.close(theirs)
    os.close(alive)
    assert os.read(gone, 1) == b""
    os.close(ours)
    os.close(gone)
    session(tmp_path)
    assert holds(tmp_path, UNITS)
    assert not list(tmp_path.rglob(".*"))


def backwards() -> None:
    """Sets the clocks of this process back by a year, and by one hour more at each reading."""
    readings, now = itertools.count(1), time.time
    time.time = lambda: now() - 365 * 86400 - 3600 * next(readings)
    time.time_ns = lambda: int(time.time() * 1e9)

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Datetime":
            return cls.fromtimestamp(time.time(), tz)

    datetime.datetime = Datetime


def test_a_clock_that_goes_back_has_no_effect(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stored files are from the future, and the clock goes back one hour at each reading."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring")

    def contents(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    capture(tiny_model, tmp_path / "a", prompts)
    capture(tiny_model, tmp_path / "b", prompts, "--limit", 1)
    for path in [tmp_path / "b", *(tmp_path / "b").rglob("*")]:
        os.utime(path, (2e9, 2e9))

    def resumed() -> None:
        backwards()
        small = ("--steps", 3, "--height", 16, "--width", 16, "--device", "cpu")
        printing("capture", tiny_model, tmp_path / "b", "--prompts", prompts, "--resume", *small)

    assert in_child(resumed) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    Capture.open(tmp_path / "b").verify()


HOSTILE = "a\x1b[31m\x9b2J\x07\u202eb\nc\rd\x7f\udce9[red]e"
ESCAPED = r"a\x1b[31m\x9b2J\x07\u202eb\nc\rd\x7f\udce9[red]e"


def test_words_from_files_are_escaped_in_every_kind_of_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("ключ 键 👩‍🚀 ر") == "ключ 键 👩‍🚀 ر"
    terminal = Terminal()
    terminal.say(HOSTILE)
    terminal.warn(HOSTILE)
    terminal.table(HOSTILE, ["layer"], [[HOSTILE]])
    output = capsys.readouterr()
    assert output.out.count(ESCAPED) == 3
    assert output.err == f"Warning: {ESCAPED}\n"
    with pytest.raises(SystemExit), errors(debug=False):
        raise OctavoError(f"{HOSTILE}: damaged.")
    assert (
        capsys.readouterr().err
        == f"Error: {ESCAPED.replace(chr(92) + 'n', ' ').replace(chr(92) + 'r', ' ')}: damaged.\n"
    )


CELLS = ["bfloat16", "few rows of a layer", "-", "0.5", "-12.25", "transformer_blocks.3.attn.to_q", ""]
WORST = ["layer", "SQNR", "range", "scale", "zero point"]
LAYERS = [
    [f"transformer_blocks.{index}.attn.add_k_proj", "36.1 dB", "-6.57 .. 6.89", "0.0528", "-4"] for index in range(2)
] + [["single_transformer_blocks.23.norm.linear_with_a_name_wider_than_a_line", "9.0 dB", "", "1", "0"]]


@pytest.mark.parametrize("columns", [40, 60, 81, 200])
def test_no_word_and_no_number_of_a_table_is_broken_where_a_line_can_hold_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    Terminal().table("Worst by SQNR", WORST, LAYERS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Worst by SQNR"
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    for cell in (cell for row in LAYERS for cell in row if len(cell) < columns - 4):
        assert cell in text, cell
    assert ("SQNR 36.1 dB, range -6.57 .. 6.89" in text) == (columns < 100)


def test_sentences_of_a_table_wrap_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names, why = "pos_embed.proj, time_text_embed and 12 more", "embedders stay float, as their inputs are few"
    Terminal().table("Kept float", ["layers", "why"], [[names, why]])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 60
    assert all(word in output.split() for word in f"{names} {why}".split())
    assert "┃" in output


@examples(1000)
@given(
    columns=st.integers(30, 120),
    rows=st.lists(st.lists(st.sampled_from(CELLS), min_size=4, max_size=4), min_size=1, max_size=4),
)
def test_a_grid_fits_its_width_and_breaks_no_word(columns: int, rows: list[list[str]]) -> None:
    names = ["layer", "time in float32", "choice", "zero point"]
    if list_text("", names, rows, columns) is not None:
        return
    text = grid_text("", names, rows, Console(width=columns, color_system=None))
    assert max(map(len, text.splitlines())) <= columns
    shown = set(re.split(r"[\s│┃]+", text))
    assert {word for cells in [names, *rows] for cell in cells for word in cell.split()} <= shown


def test_a_json_line_gives_back_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True).event("prompt", text=HOSTILE)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"event": "prompt", "text": HOSTILE}
    assert line.isprintable()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_narrow_encoding_gets_question_marks(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    prepare_streams()
    Terminal().say("键 ▁▂ é")
    Terminal().table("", ["键"], [["é"]])
    output = written.getvalue()
    # click writes UTF-8 to a stream whose encoding is ASCII
    assert output.startswith("? ?? é".encode("latin-1") if encoding == "latin-1" else "键".encode())


def test_a_reader_that_goes_ends_the_command_as_it_ends_other_tools(capfd: pytest.CaptureFixture[str]) -> None:
    def gone() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        main(["inspect", "demo-int8"])

    assert in_child(lambda: check_exit_code(gone, 128 + signal.SIGPIPE)) == 0
    assert "Traceback" not in capfd.readouterr().err


def check_exit_code(work: Callable[[], None], code: int) -> None:
    """Checks that `work` exits with this code."""
    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == code


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_changes_no_exit_code(tmp_path: Path, descriptor: int) -> None:
    def closed() -> None:
        os.close(descriptor)
        sys.stdout, sys.stderr = (None, sys.stderr) if descriptor == 1 else (sys.stdout, None)  # as Python sets them
        check_exit_code(lambda: main(["inspect", str(tmp_path / "none")]), 2)
        assert not os.fstat(descriptor).st_size  # Octavo opened no file with that descriptor

    assert in_child(closed) == 0


def test_a_full_disk_behind_stdout_is_an_error_of_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        refused(lambda: Terminal().say("text"), 5, "standard output: no space left")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(Terminal().progress("freeze", range(3), 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    for as_json in (False, True):
        terminal = Terminal(as_json)
        terminal._reports = Reports(terminal._report, every=0.0)
        list(terminal.progress("freeze", range(3), 3))
        with terminal.bars("prompts", 2, 4) as show:
            show(1, 2)
        output = capsys.readouterr()
        lines = output.out.splitlines() if as_json else output.err.splitlines()
        assert len(lines) == 4
        if as_json:
            events = [json.loads(line) for line in lines]
            assert [event["done"] for event in events] == [0, 1, 2, 1]
            assert {event["event"] for event in events} == {"progress"}
        else:
            assert lines[0] == "freeze: 0 of 3"
            assert lines[2].startswith("freeze: 2 of 3, about ")
            assert lines[3].startswith("prompts: 1 of 2, about ")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["calibrate", "--help-all"]])
def test_help_that_cannot_be_written_is_an_error_of_storage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        check_exit_code(lambda: main(arguments), 5)
    assert capsys.readouterr().err == "Error: standard output: no space left. Free space and run again.\n"
