"""The data files of a unit: safetensors, read with pread and checked before use.

Truncating a mapped file kills the process; reading a truncated file gives an error.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import damage
from ..sealed import digest_of, pread
from .headers import HEADER_LIMIT, WORDS, Stored, key_of, placed

NAMES = {word: name for name, word in WORDS.items()}


class Part(NamedTuple):
    """A data file as unit.json describes it."""

    file: str
    bytes: int
    header: str  # digest of the length and the JSON in front of the data


def read_header(descriptor: int, size: int, part: Part, path: Path, remedy: str) -> dict[str, Stored]:
    """Reads the header of an open data file, whose size and header must match unit.json; returns the blobs.

    Reads nothing but the header, and does not read a header that claims more than HEADER_LIMIT bytes.
    """
    if size != part.bytes:
        raise damage(path, f"damaged (checksum: {size} bytes, not {part.bytes})", remedy)
    prefix = bytearray(8)
    pread(descriptor, memoryview(prefix), 0, path, remedy)
    length = int.from_bytes(prefix, "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise damage(path, f"damaged (checksum: header of {length} bytes)", remedy)
    text = bytearray(length)
    pread(descriptor, memoryview(text), 8, path, remedy)
    if digest_of(bytes(prefix + text)) != part.header:
        raise damage(path, "damaged (checksum)", remedy)
    try:
        return placed(json.loads(bytes(text)), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise damage(path, f"not a data file of a capture ({exc})", remedy) from exc


def read_blob(descriptor: int, blob: Stored, into: memoryview, path: Path, remedy: str) -> None:
    """Reads a blob into memory of its size."""
    if blob.bytes:
        pread(descriptor, into, blob.offset, path, remedy)


def matches(key: str, blob: Stored, data: memoryview) -> bool:
    """Whether the key is that of a blob with these bytes."""
    return key_of(NAMES[blob.dtype], blob.shape, data) == key
