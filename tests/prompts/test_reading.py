"""Checks how text files of prompts are read or refused, and what the bundled sets hold."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.prompts import BUNDLED, Prompts, read_prompts

from ..helpers.refusals import refused


def read(path: Path, data: bytes) -> Prompts:
    path.write_bytes(data)
    return read_prompts(str(path))


def refused_prompts(path: Path, data: bytes | None = None, exit_code: int = 3) -> str:
    """Checks that the prompts are refused with this exit code. Returns the message without the path in front."""
    if data is not None:
        path.write_bytes(data)
    message = refused(lambda: read_prompts(str(path)), exit_code)
    return message.removeprefix(str(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompts.txt"


def test_a_missing_file_is_refused(path: Path) -> None:
    expected = ": no such prompts file. Give a file or one of demo, demo-heldout, images, videos."
    assert refused_prompts(path, exit_code=2) == expected
    assert refused_prompts(path / "below", exit_code=2) == expected


SPECIAL: dict[str, Callable[[Path], None]] = {
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(path: Path, kind: str) -> None:
    SPECIAL[kind](path)
    assert refused_prompts(path) == ": not a regular file. Give a text file."


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n\n\r  ", b"\xef\xbb\xbf", b"\xe2\x80\xa8\n"], ids=repr)
def test_a_file_without_prompts_is_refused(path: Path, data: bytes) -> None:
    assert refused_prompts(path, data) == ": holds no prompts. Write one prompt in each line."


def test_a_byte_order_mark_is_stripped_in_front_only(path: Path) -> None:
    assert read(path, b"\xef\xbb\xbfan otter\n").texts == ("an otter",)
    assert read(path, b"a\n\xef\xbb\xbfb").texts == ("a", "\ufeffb")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("final", [True, False])
def test_line_ends_make_no_difference(path: Path, end: str, final: bool) -> None:
    lines = ["an otter", "", "a fox", "ein Fuchs "]
    prompts = read(path, (end.join(lines) + (end if final else "")).encode())
    assert prompts == Prompts(("an otter", "a fox", "ein Fuchs "), (1, 3, 4), (), prompts.digest)
    assert prompts.digest == read(path, b"an otter\na fox\nein Fuchs ").digest


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=repr)
def test_line_ends_are_found_where_blocks_meet(path: Path, end: bytes) -> None:
    for size in range((1 << 16) - 3, (1 << 16) + 3):
        first = b"a" * (size - 10) + end + b"b" * 5
        prompts = read(path, first + end + b"c" + end)
        assert prompts.lines == (1, 2, 3)
        assert prompts.texts[1:] == ("bbbbb", "c")


def test_only_line_ends_end_a_line(path: Path) -> None:
    text = "a\u2028b\u2029c\vd\fe\u0085f\x1cg\x1dh\x1ei\tj"
    assert read(path, f"{text}\nnext\n".encode()).texts == (text, "next")
    assert len(text.splitlines()) == 9


def test_blank_lines_are_skipped_and_numbers_kept(path: Path) -> None:
    prompts = read(path, b"\n\na\n   \nb\n")
    assert (prompts.texts, prompts.lines) == (("a", "b"), (3, 5))


def test_repeated_lines_are_captured_once(path: Path) -> None:
    prompts = read(path, b"\na\nb\n" + b"\n" * 5 + b"a\n" + b"a \n")
    assert (prompts.texts, prompts.lines) == (("a", "b", "a "), (2, 3, 10))
    assert prompts.warnings == (f"{path}: line 9 repeats line 2; captured once.",)
    many = read(path, b"a\n" * 100)
    assert len(many.warnings) == 21
    assert many.warnings[-1] == f"{path}: 79 more lines repeat earlier ones; captured once."


def test_bytes_that_are_not_utf8_are_refused(path: Path) -> None:
    assert refused_prompts(path, b"tea\ncaf\xe9\n") == ": line 2: not UTF-8 (byte 0xe9 at column 4). Save it as UTF-8."
    assert (
        refused_prompts(path, "äö".encode() + b"\xff")
        == ": line 1: not UTF-8 (byte 0xff at column 3). Save it as UTF-8."
    )
    assert "line 1: not UTF-8" in refused_prompts(path, b"\xed\xa0\x80")  # the encoding of a surrogate


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused_by_name(path: Path, encoding: str) -> None:
    assert refused_prompts(path, "an otter\n".encode(encoding)) == ": looks like UTF-16. Save it as UTF-8."


@pytest.mark.parametrize("code", [0, 1, 7, 8, 0x0E, 0x1B, 0x1F])
def test_control_characters_are_refused(path: Path, code: int) -> None:
    message = f": line 3: control character U+{code:04X}. Remove it."
    assert refused_prompts(path, b"one\ntwo\nth" + bytes([code]) + b"ree\n") == message


@pytest.mark.parametrize("character", ["a", "語", "🦦"])
def test_long_lines_are_refused(path: Path, character: str) -> None:
    assert read(path, (character * 65_536 + "\nb").encode()).lines == (1, 2)
    message = ": line 1: longer than 65536 characters. Write one prompt in each line."
    assert refused_prompts(path, (character * 65_537 + "\nb").encode()) == message
    assert refused_prompts(path, (character * 10_000_000).encode()) == message


def test_a_long_line_is_not_held_in_memory(path: Path) -> None:
    path.write_bytes(b"ok\n" + b"a" * 10_000_000)

    tracemalloc.start()
    try:
        assert refused_prompts(path).startswith(": line 2: longer than")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_too_many_prompts_are_refused(path: Path) -> None:
    assert refused_prompts(path, b"a\n" * 1_000_001) == ": more than 1000000 prompts. Split the file."
    assert len(read(path, b"a\n" + b"\n" * 1_000_001).texts) == 1


def test_texts_come_back_byte_for_byte(path: Path) -> None:
    texts = ("一只水獭踩滑板", "👩‍🚀🦦", "ثعلب في الثلج", "cafe\u0301", "café", "  spaces  kept ", "A\u200d\u202eB")
    prompts = read(path, "\n".join(texts).encode())
    assert "\n".join(prompts.texts).encode() == path.read_bytes()
    assert prompts.warnings == ()


@pytest.mark.parametrize(("name", "count"), [("images", 64), ("videos", 32), ("demo", 64), ("demo-heldout", 200)])
def test_bundled_sets(name: str, count: int) -> None:
    assert name in BUNDLED
    prompts = read_prompts(name)
    assert (len(prompts.texts), prompts.warnings, prompts.lines) == (count, (), tuple(range(1, count + 1)))
    assert all(text == text.strip() and 20 < len(text) < 200 for text in prompts.texts)


def test_videos_speak_of_motion_and_camera() -> None:
    texts = " ".join(read_prompts("videos").texts).lower()
    assert texts.count("camera") >= 8
    for word in ("shot", "pan", "zoom", "tilts", "close-up", "time-lapse", "slow motion", "tracking", "circles"):
        assert word in texts
