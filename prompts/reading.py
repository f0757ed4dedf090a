"""Reading a file of prompts, whoever wrote it.

A line ends with LF, CRLF or CR and with nothing else: U+2028, U+0085, VT, FF and FS to RS stand inside prompts that
were pasted from somewhere. Memory is bounded by the prompts kept and one line.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from octavo.capture.errors import FileError, OctavoError, UsageError

BUNDLED = ("demo", "demo-heldout", "images", "videos")
MAX_CHARACTERS = 65_536
MAX_PROMPTS = 1_000_000
MAX_WARNINGS = 20
BLOCK = 1 << 16
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f]")
UTF16 = re.compile(b"\xff\xfe|\xfe\xff|[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", re.DOTALL)


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a file in its order, the line each stands on, and what is worth telling the user.

    `digest` is of the texts alone: files that differ in line ends or blank lines have the same.
    """

    texts: tuple[str, ...]
    lines: tuple[int, ...]
    warnings: tuple[str, ...]
    digest: str


def read_prompts(name_or_path: str) -> Prompts:
    """The prompts of a bundled set or of a file. Raises UsageError without one, FileError when it is not usable."""
    path = Path(__file__).with_name(f"{name_or_path}.txt") if name_or_path in BUNDLED else Path(name_or_path)
    first_line: dict[str, int] = {}
    warnings: list[str] = []
    count = repeated = 0
    for number, text in _lines(path):
        if not text.strip():
            continue
        count += 1
        if count > MAX_PROMPTS:
            raise FileError(f"{path}: more than {MAX_PROMPTS} prompts. Split the file.")
        first = first_line.setdefault(text, number)
        if first != number:
            repeated += 1
            if repeated <= MAX_WARNINGS:
                warnings.append(f"{path}: line {number} repeats line {first}; captured once.")
    if not first_line:
        raise FileError(f"{path}: holds no prompts. Write one a line.")
    if repeated > MAX_WARNINGS:
        warnings.append(f"{path}: {repeated - MAX_WARNINGS} more lines repeat earlier ones; captured once.")
    digest = sha256()
    for text in first_line:
        digest.update(text.encode() + b"\n")
    return Prompts(tuple(first_line), tuple(first_line.values()), tuple(warnings), digest.hexdigest())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, checked."""
    for number, raw in enumerate(_raw_lines(path), 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            column = len(raw[: exc.start].decode("utf-8")) + 1
            fact = f"not UTF-8 (byte 0x{raw[exc.start]:02x} at column {column})"
            raise FileError(f"{path}: line {number}: {fact}. Save it as UTF-8.") from exc
        if len(text) > MAX_CHARACTERS:
            raise _too_long(path, number)
        control = CONTROL.search(text)
        if control is not None:
            fact = f"control character U+{ord(control[0]):04X}"
            raise FileError(f"{path}: line {number}: {fact}. Remove it.")
        yield number, text


def _too_long(path: Path, number: int) -> OctavoError:
    return FileError(f"{path}: line {number}: longer than {MAX_CHARACTERS} characters. Write one prompt a line.")


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends and without a byte order mark, holding one block and one line."""
    rest, number = b"", 0
    for block in _blocks(path):
        # a CR that ends a block may be the first half of a CRLF: it stays in the rest
        held = block[-1:] if block.endswith(b"\r") else b""
        body = rest + (block[:-1] if held else block)
        *complete, tail = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from complete
        number += len(complete)
        if len(tail) > 4 * MAX_CHARACTERS:
            raise _too_long(path, number + 1)
        rest = tail + held
    if rest:
        yield rest.removesuffix(b"\r")


def _blocks(path: Path) -> Iterator[bytes]:
    """The content of a regular file in blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise _open_error(path, exc) from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path}: not a regular file. Give a text file.")
        block = os.read(descriptor, BLOCK)
        if UTF16.match(block):
            raise FileError(f"{path}: looks like UTF-16; save it as UTF-8.")
        block = block.removeprefix(b"\xef\xbb\xbf")
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
