"""Reads a file of prompts. A .csv, .tsv, .json or .jsonl file is read as a table (`tables`); any other has one prompt
in each line.

Only LF, CRLF and CR end a line, because prompts pasted from other programs contain other separators, such as U+2028 and
VT. Needs memory for the distinct prompts and one line.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from octavo.capture.errors import FileError, OctavoError, UsageError

from .tables import LINES, delimited, json_document, json_lines, refuse_unread

BUNDLED = ("demo", "demo-heldout", "images", "videos")
MAX_CHARACTERS = 65_536  # in one prompt
MAX_PROMPTS = 1_000_000  # in one file, repeated prompts included
MAX_WARNINGS = 20  # repeated lines that are reported one by one; the rest are counted
MAX_TABLE = 1 << 28  # bytes of a .csv, .tsv, .json or .jsonl file, which is read as a whole
BLOCK = 1 << 16  # bytes of one read
# refused in prompts: control characters except tab, line ends, VT, FF and FS to RS; lone surrogates
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\ud800-\udfff]")
UTF16 = re.compile(b"\xff\xfe|\xfe\xff|[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", re.DOTALL)


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a file in the file's order, the number of each one's line, and warnings for the user.

    For a .json file `lines` has the numbers of entries. `digest` covers the texts alone: files that differ only in line
    ends or blank lines have the same digest.
    """

    texts: tuple[str, ...]
    lines: tuple[int, ...]
    warnings: tuple[str, ...]
    digest: str


def read_prompts(name_or_path: str) -> Prompts:
    """Reads the bundled set of prompts of this name, such as demo, or the file at this path.

    Raises UsageError for a missing file, FileError for a file that holds no prompts or is not UTF-8 text.
    """
    path = Path(__file__).with_name(f"{name_or_path}.txt") if name_or_path in BUNDLED else Path(name_or_path)
    first_line: dict[str, int] = {}
    warnings: list[str] = []
    count = repeated = 0
    word, words = ("entry", "entries") if path.suffix.lower() == ".json" else ("line", "lines")
    for number, text in _prompts(path, warnings):
        if not text.strip():
            continue
        count += 1
        if count > MAX_PROMPTS:
            raise FileError(f"{path}: more than {MAX_PROMPTS} prompts. Split the file.")
        first = first_line.setdefault(text, number)
        if first != number:
            repeated += 1
            if repeated <= MAX_WARNINGS:
                warnings.append(f"{path}: {word} {number} repeats {word} {first}; captured once.")
    if not first_line:
        raise FileError(f"{path}: holds no prompts. Write one prompt in each line.")
    if repeated > MAX_WARNINGS:
        warnings.append(f"{path}: {repeated - MAX_WARNINGS} more {words} repeat earlier ones; captured once.")
    digest = sha256()
    for text in first_line:
        digest.update(text.encode() + b"\n")
    return Prompts(tuple(first_line), tuple(first_line.values()), tuple(warnings), digest.hexdigest())


def _prompts(path: Path, notes: list[str]) -> Iterator[tuple[int, str]]:
    """Yields a number and a checked text for each prompt: the number of its line or entry in the file. The text may be
    blank.

    Appends to `notes` what the user should know about columns that are not read.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _checked(path, "line", delimited(path, list(_lines(path, MAX_TABLE)), notes))
    if suffix in (".jsonl", ".ndjson"):
        return _checked(path, "line", json_lines(path, _lines(path, MAX_TABLE), notes))
    if suffix == ".json":
        return _checked(path, "entry", json_document(path, _text(path, MAX_TABLE), notes))
    refuse_unread(path)
    return _lines(path)


def _checked(path: Path, word: str, prompts: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yields the numbered prompts of a table after checking each text, since escapes may hide control characters.

    `word` says in messages what the numbers count: "line" or "entry". Raises FileError for a text that is too long or
    has control characters.
    """
    for number, text in prompts:
        _check_text(path, f"{word} {number}", text)
        yield number, text


def _text(path: Path, most: int) -> str:
    """Returns the text of a UTF-8 file. Raises FileError for another encoding and for more than `most` bytes."""
    data = b"".join(_blocks(path, most))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line, fact = data.count(b"\n", 0, exc.start) + 1, f"not UTF-8 (byte 0x{data[exc.start]:02x})"
        raise FileError(f"{path}: line {line}: {fact}. Save it as UTF-8.") from exc


def _lines(path: Path, most: int | None = None) -> Iterator[tuple[int, str]]:
    """Yields the number and the checked text of each line of a file.

    Raises FileError for text that is not UTF-8 or not allowed in a prompt, and for more than `most` bytes.
    """
    for number, raw in enumerate(_raw_lines(path, most), 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            column = len(raw[: exc.start].decode("utf-8")) + 1
            fact = f"not UTF-8 (byte 0x{raw[exc.start]:02x} at column {column})"
            raise FileError(f"{path}: line {number}: {fact}. Save it as UTF-8.") from exc
        _check_text(path, f"line {number}", text)
        yield number, text


def _check_text(path: Path, where: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise _too_long(path, where)
    if (control := CONTROL.search(text)) is not None:
        kind = "half a character" if 0xD800 <= ord(control[0]) < 0xE000 else "control character"
        raise FileError(f"{path}: {where}: {kind} U+{ord(control[0]):04X}. Remove it.")


def _too_long(path: Path, where: str) -> OctavoError:
    return FileError(f"{path}: {where}: longer than {MAX_CHARACTERS} characters. Write one prompt in each line.")


def _raw_lines(path: Path, most: int | None) -> Iterator[bytes]:
    """Yields the lines of a file without line ends and byte order mark.

    Holds one line and 64 KiB (BLOCK) of the file in memory. Raises FileError for more than `most` bytes and for a line
    that is longer than any prompt may be.
    """
    rest, number = b"", 0
    for block in _blocks(path, most):
        # a CR at the end of a block may be the first half of a CRLF: keep it for the next block
        carried = block[-1:] if block.endswith(b"\r") else b""
        body = rest + (block[:-1] if carried else block)
        *complete, tail = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from complete
        number += len(complete)
        if len(tail) > 4 * MAX_CHARACTERS:
            raise _too_long(path, f"line {number + 1}")
        rest = tail + carried
    if rest:
        yield rest.removesuffix(b"\r")


def _blocks(path: Path, most: int | None = None) -> Iterator[bytes]:
    """Yields the content of a regular file, at most 64 KiB (BLOCK) at a time, without a byte order mark.

    Raises UsageError for a missing file; FileError for a directory or a device, for a file in UTF-16, and for a file of
    more than `most` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise _open_error(path, exc) from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path}: not a regular file. Give a text file.")
        block = os.read(descriptor, BLOCK)
        if UTF16.match(block):
            raise FileError(f"{path}: looks like UTF-16. Save it as UTF-8.")
        block = block.removeprefix(b"\xef\xbb\xbf")
        if most is not None and os.fstat(descriptor).st_size > most:
            raise FileError(f"{path}: is a table larger than {most >> 20} MiB. Instead write {LINES}.")
        while block:
            yield block
            block = os.read(descriptor, BLOCK)
    except OSError as exc:
        raise _open_error(path, exc) from exc
    finally:
        os.close(descriptor)


def _open_error(path: Path, exc: OSError | ValueError) -> OctavoError:
    if not isinstance(exc, OSError) or exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return UsageError(f"{path}: no such prompts file. Give a file or one of {', '.join(BUNDLED)}.")
    if exc.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR):
        return FileError(f"{path}: not a regular file. Give a text file.")
    return FileError(f"{path}: {(exc.strerror or str(exc)).lower()}. Check its permissions.")
