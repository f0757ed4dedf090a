"""The data files of a unit: safetensors, written from tensors' own memory, read with pread and checked before use.

Truncating a mapped file kills the process; reading a truncated file gives an error.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import damage
from ..files import create
from ..sealed import digest_of, pread
from .blobs import DTYPES, NAMES, key_of, memory_of

HEADER_LIMIT = 16 << 20  # bytes; the largest header that is read
PART_BYTES = 256 << 20  # most bytes of a data file, unless one blob is larger
PART_BLOBS = 1 << 15  # most blobs of a data file: keeps headers far below HEADER_LIMIT


class Part(NamedTuple):
    """A data file as unit.json describes it."""

    file: str
    bytes: int
    header: str  # digest of the length and the JSON in front of the data


class Stored(NamedTuple):
    """The place of a tensor in its file: dtype, shape, offset and bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def write_part(path: Path, blobs: dict[str, torch.Tensor], mode: int) -> Part:
    """Writes settled tensors under their keys to a file that does not exist yet."""
    # the widest elements first, so that every blob is aligned for its dtype
    ordered = sorted(blobs.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.nbytes
        entries[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = header_of(entries)
    with create(path, mode) as sink:
        sink.write(header)
        for _, tensor in ordered:
            sink.write(memory_of(tensor))
    return Part(path.name, len(header) + offset, digest_of(header))


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


def header_of(entries: dict[str, Any]) -> bytes:
    """The header of a safetensors file: length and JSON, padded so that the data begin at a multiple of 8."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def placed(entries: dict[str, Any], start: int, size: int) -> dict[str, Stored]:
    """The tensors of a header in the order of their data, which must cover a file from `start` to `size`.

    Raises ValueError, TypeError, KeyError or AttributeError for any other header.
    """
    tensors = [(name, entry) for name, entry in entries.items() if name != "__metadata__"]
    found = {}
    expected = start  # without a gap or an overlap
    for name, entry in sorted(tensors, key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("negative or fractional size")
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        if start + begin != expected or end - begin != count:
            raise ValueError("offsets that do not fit")
        found[name] = Stored(dtype, shape, start + begin, count)
        expected = start + end
    if expected != size:
        raise ValueError("file not fully covered")
    return found


def read_blob(descriptor: int, blob: Stored, into: torch.Tensor, path: Path, remedy: str) -> None:
    """Reads a blob into a contiguous tensor of its dtype and size."""
    if blob.bytes:
        pread(descriptor, memory_of(into), blob.offset, path, remedy)


def matches(key: str, blob: Stored, tensor: torch.Tensor) -> bool:
    """Whether the key is that of the tensor's bytes."""
    return key_of(NAMES[blob.dtype], blob.shape, memory_of(tensor)) == key


def split_parts(blobs: dict[str, torch.Tensor]) -> Sequence[dict[str, torch.Tensor]]:
    """Divides `blobs`, in order, into files of at most PART_BYTES and PART_BLOBS; a larger blob is a file alone."""
    parts: list[dict[str, torch.Tensor]] = []
    filled = 0
    for key, tensor in blobs.items():
        if not parts or filled + tensor.nbytes > PART_BYTES or len(parts[-1]) >= PART_BLOBS:
            parts.append({})
            filled = 0
        parts[-1][key] = tensor
        filled += tensor.nbytes
    return parts
