"""Makes and checks headers of safetensors files, and computes the keys of blobs, without importing torch.

A header is eight bytes with its length, then JSON with the dtype, shape and offsets of each tensor. A blob is a tensor,
or a row of a tensor, that a unit stores under its key, sha256(dtype | shape | bytes). The key serves to recognise a
blob that is already stored, and to detect damage.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

HEADER_LIMIT = 16 << 20  # bytes; the largest header that is read
# the dtypes that can be stored: name in the safetensors format -> name in torch
TORCH_NAMES = {
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
# the dtypes that a file of another program may have: TORCH_NAMES, and one that Octavo does not write
READABLE_NAMES = TORCH_NAMES | {"F8_E8M0": "float8_e8m0fnu"}
# bytes of one value of each dtype; a name that is not listed ends with the number of bits
_SIZES = {"BOOL": 1, "BF16": 2} | {name: 1 for name in READABLE_NAMES if name.startswith("F8")}
_SIZES |= {name: int(name[1:]) // 8 for name in READABLE_NAMES if name not in _SIZES}


class Stored(NamedTuple):
    """Describes a tensor in a file: dtype by torch's name (bfloat16), shape, offset of its bytes in the file, size in
    bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def key_of(name: str, shape: Sequence[int], data: memoryview) -> str:
    """Returns the key under which the tensor bytes `data` are stored: the SHA-256 of dtype, shape and bytes.

    `name` is the name of the dtype in the safetensors format, such as BF16.
    """
    digest = sha256(f"{name}|{','.join(map(str, shape))}|".encode())
    digest.update(data)
    return digest.hexdigest()


def header_of(entries: dict[str, Any]) -> bytes:
    """Makes the header of a safetensors file from `entries`, which maps names to dtype, shape and offsets of tensors.

    The header is the length and the JSON, padded with spaces so that the data begin at a multiple of 8 bytes.
    """
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors_of(
    entries: dict[str, Any], start: int, size: int, names: Mapping[str, str] = TORCH_NAMES
) -> dict[str, Stored]:
    """Returns a dict from tensor name to Stored, made from the `entries` of a header, in the order of the data. `names`
    has the dtypes that are allowed, from the name in the safetensors format to that in torch.

    Raises ValueError, TypeError, KeyError or AttributeError for a malformed header, or unless the tensors cover the
    file from byte `start` to byte `size` without gap or overlap.
    """
    tensors = [(name, entry) for name, entry in entries.items() if name != "__metadata__"]
    stored = {}
    expected = start  # where the next tensor must begin
    for name, entry in sorted(tensors, key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape = names[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("its header has a negative or fractional size")
        count = _SIZES[entry["dtype"]]
        for extent in shape:
            count *= extent
        if start + begin != expected or end - begin != count:
            raise ValueError("its header has an offset that does not match the size of the tensor")
        stored[name] = Stored(dtype, shape, start + begin, count)
        expected = start + end
    if expected != size:
        raise ValueError("its tensors do not cover the whole file")
    return stored
