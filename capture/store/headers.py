"""Headers of safetensors files: dtypes, places of tensors, and the keys of blobs. Importing this module needs no torch.

A header is eight bytes of length, then JSON that gives each tensor's dtype, shape and offsets. The key of a blob is
sha256(dtype | shape | bytes), which shows both that a blob is stored already and that it is undamaged.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

HEADER_LIMIT = 16 << 20  # bytes; the largest header that is read
# dtypes that can be stored: torch's names by the names in the safetensors format
WORDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_SIZES = {"BOOL": 1, "BF16": 2} | {name: 1 for name in WORDS if name.startswith("F8")}  # bytes of a value; else
_SIZES |= {name: int(name[1:]) // 8 for name in WORDS if name not in _SIZES}  # the name ends in the bits


class Stored(NamedTuple):
    """The place of a tensor in its file: dtype by torch's name, such as bfloat16, then shape, offset and bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def key_of(name: str, shape: Sequence[int], data: memoryview) -> str:
    """The key of the blob with these bytes; `name` is the dtype's name in the safetensors format."""
    digest = sha256(f"{name}|{','.join(map(str, shape))}|".encode())
    digest.update(data)
    return digest.hexdigest()


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
        dtype, shape = WORDS[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("negative or fractional size")
        count = _SIZES[entry["dtype"]]
        for extent in shape:
            count *= extent
        if start + begin != expected or end - begin != count:
            raise ValueError("offsets that do not fit")
        found[name] = Stored(dtype, shape, start + begin, count)
        expected = start + end
    if expected != size:
        raise ValueError("file not fully covered")
    return found
