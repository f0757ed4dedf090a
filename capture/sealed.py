"""Reads files with checks of type and size; writes and reads sealed JSON.

A sealed file is {"sha256": digest, "body": ...}, where the digest is the SHA-256 of the body as canonical JSON.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from .errors import OctavoError, StorageError, UsageError, damage, storage_error
from .json_kinds import check_characters, parse_json

MANIFEST_LIMIT = 64 << 20  # bytes; the largest sealed file that is written or read
_PIECE = 1 << 20  # bytes of a file that are read and hashed at once: 1 MiB fits into a processor's cache
# the bytes of a sealed file before the digest, between digest and body, and after the body
HEAD = b'{"sha256": "'
MIDDLE = b'", "body": '
TAIL = b"}\n"


@contextmanager
def open_regular(path: Path, remedy: str = "") -> Iterator[tuple[int, int]]:
    """Opens a regular file and yields its descriptor and its size in bytes; closes it when the `with` block ends.

    Raises FileError for a missing file and, without reading it, for a link, FIFO, device or directory. `remedy` ends
    the message and says what the user can do.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise _open_error(path, exc, remedy) from exc
    except ValueError as exc:  # a name with a null byte
        raise damage(path, "not the name of a file", remedy) from exc
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise damage(path, "not a regular file", remedy)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _open_error(path: Path, exc: OSError, remedy: str) -> OctavoError:
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return damage(path, "missing", remedy)
    if exc.errno == errno.ELOOP:
        return damage(path, "is a symbolic link inside the capture", remedy)
    if exc.errno in (errno.ENXIO, errno.ENODEV):
        return damage(path, "not a regular file", remedy)
    return storage_error(path, exc)


def pread(descriptor: int, view: memoryview, offset: int, path: Path, remedy: str = "") -> None:
    """Fills `view` with the bytes of an open file from byte `offset` on. Raises FileError if the file ends too early.

    The message of the error names `path`, and ends with `remedy`, which says what the user can do.
    """
    done = 0
    while done < view.nbytes:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as exc:
            raise storage_error(path, exc) from exc
        if count == 0:
            raise damage(path, "damaged (truncated)", remedy)
        done += count


def read_bytes(path: Path, limit: int = MANIFEST_LIMIT, remedy: str = "") -> bytes:
    """Reads a whole regular file. Raises FileError if it is larger than `limit` bytes. The message ends with `remedy`,
    which says what the user can do."""
    with open_regular(path, remedy) as (descriptor, size):
        if size > limit:
            raise damage(path, f"larger than {limit >> 20} MiB", remedy)
        data = bytearray(size)
        pread(descriptor, memoryview(data), 0, path, remedy)
    return bytes(data)


def digest_of_file(path: Path, remedy: str = "") -> str:
    """Returns the hexadecimal SHA-256 of a regular file. If the file cannot be read, the message of the error ends with
    `remedy`, which says what the user can do."""
    digest, piece = sha256(), memoryview(bytearray(_PIECE))
    with open_regular(path, remedy) as (descriptor, size):
        for offset in range(0, size, _PIECE):
            part = piece[: min(_PIECE, size - offset)]
            pread(descriptor, part, offset, path, remedy)
            digest.update(part)
    return digest.hexdigest()


def digest_of(data: bytes) -> str:
    """Returns the hexadecimal SHA-256 of `data`."""
    return sha256(data).hexdigest()


def canonical(body: Any) -> bytes:
    """Returns `body` as canonical JSON (sorted keys, no spaces), so that equal values always give the same bytes.

    Raises UsageError for text that UTF-8 cannot encode, such as a file name in another encoding.
    """
    content = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    try:
        check_characters(body, content)
    except UnicodeEncodeError as error:
        text = error.object[max(0, error.start - 20) : error.end + 20]
        raise UsageError(f"{text!r}: cannot be written as UTF-8. Rename the file or change the text.") from None
    return content


class Sealed(NamedTuple):
    """Holds the body of a sealed file (JSON with its own SHA-256), and the SHA-256 of the whole file."""

    body: Any
    digest: str


def json_object(content: bytes, path: Path, remedy: str = "", *, finite: bool = True) -> dict[str, Any]:
    """Parses `content`, read from the file at `path`, as a JSON object.

    Raises FileError if `content` is not a JSON object or, with `finite`, if it has NaN or an infinite number. The
    message ends with `remedy`, which says what the user can do.
    """
    try:
        value = parse_json(content, finite=finite)
    except json.JSONDecodeError as error:
        raise damage(path, f"not valid JSON (line {error.lineno})", remedy) from None
    except UnicodeError:
        raise damage(path, "not valid JSON (not UTF-8)", remedy) from None
    except ValueError as error:
        raise damage(path, f"not valid JSON ({error})", remedy) from None
    if not isinstance(value, dict):
        raise damage(path, "does not hold a JSON object", remedy)
    return value


def seal(body: Any) -> bytes:
    """Returns the content of a sealed file: `body` as canonical JSON, with its SHA-256.

    Raises StorageError if the content is larger than 64 MiB (MANIFEST_LIMIT).
    """
    content = canonical(body)
    data = HEAD + digest_of(content).encode() + MIDDLE + content + TAIL
    if len(data) > MANIFEST_LIMIT:
        fact = f"a JSON file of the capture would be larger than {MANIFEST_LIMIT >> 20} MiB"
        raise StorageError(f"{fact}. Capture fewer prompts, or store fewer steps of each with --keep spread:K.")
    return data


def read_sealed(path: Path, remedy: str = "", limit: int = MANIFEST_LIMIT) -> Sealed:
    """Reads a sealed file: JSON that holds its own SHA-256. Raises FileError if a single bit of the file has changed,
    or if the file is larger than `limit` bytes. The message ends with `remedy`, which says what the user can do."""
    data = read_bytes(path, limit, remedy)
    start = len(HEAD) + 64 + len(MIDDLE)
    content = data[start : -len(TAIL)]
    if data != HEAD + digest_of(content).encode() + MIDDLE + content + TAIL:
        raise damage(path, "damaged (checksum)", remedy)
    try:
        body = json.loads(content)
        check_characters(body, content)
    except (ValueError, RecursionError) as exc:
        raise damage(path, "damaged (not JSON)", remedy) from exc
    return Sealed(body, digest_of(data))
