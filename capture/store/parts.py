"""Reads the data files of a unit (the stored calls of one prompt), safetensors files, and checks them before use.

Uses pread and not mmap, because pread reports an error if a file is truncated meanwhile, whereas access to the memory
of a mapped file would kill the process.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import damage
from ..sealed import digest_of, pread
from .headers import HEADER_LIMIT, TORCH_NAMES, Stored, key_of, tensors_of

SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


class Part(NamedTuple):
    """Describes a data file in unit.json: its name, its size, and the digest of its header."""

    file: str
    bytes: int
    header: str  # digest of the length and the JSON in front of the data


def read_header(descriptor: int, size: int, part: Part, path: Path, remedy: str) -> dict[str, Stored]:
    """Reads the header of an open data file; returns a dict from the key of each stored tensor to its description.

    `size` is the size of the file in bytes. Raises FileError if the size or the header differs from `part`, the
    description of the file in unit.json, and, without reading the header, if it claims more than 16 MiB (HEADER_LIMIT).
    The message ends with `remedy`, which says what the user can do.
    """
    if size != part.bytes:
        raise damage(path, f"damaged (has {size} bytes, not {part.bytes})", remedy)
    prefix = bytearray(8)
    pread(descriptor, memoryview(prefix), 0, path, remedy)
    length = int.from_bytes(prefix, "little")
    most = min(HEADER_LIMIT, size - 8)
    if length > most:
        raise damage(path, f"damaged (its header claims {length} bytes, but can have at most {most})", remedy)
    text = bytearray(length)
    pread(descriptor, memoryview(text), 8, path, remedy)
    if digest_of(bytes(prefix + text)) != part.header:
        raise damage(path, "damaged (checksum)", remedy)
    try:
        return tensors_of(json.loads(bytes(text)), 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise damage(path, f"not a data file of a capture ({exc})", remedy) from exc


def read_blob(descriptor: int, blob: Stored, into: memoryview, path: Path, remedy: str) -> None:
    """Reads the bytes of the stored tensor `blob` from an open data file into `into`, which has the tensor's size.

    Raises FileError if the file ends too early; its message names `path` and ends with `remedy`, what the user can do.
    """
    if blob.bytes:
        pread(descriptor, into, blob.offset, path, remedy)


def matches(key: str, blob: Stored, data: memoryview) -> bool:
    """Returns whether `data`, the bytes of `blob`, are undamaged: whether their hash is `key`."""
    return key_of(SAFETENSORS_NAMES[blob.dtype], blob.shape, data) == key
