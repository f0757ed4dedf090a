"""Writes the data files of a unit (the stored calls of one prompt) from the tensors' own memory, without copies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import create
from ..sealed import digest_of
from .blobs import NAMES, memory_of
from .headers import header_of
from .parts import Part

PART_BYTES = 256 << 20  # most bytes of a data file, except for a single blob that is larger
PART_BLOBS = 1 << 15  # most blobs of a data file, so that its header stays far below headers.HEADER_LIMIT


def write_part(path: Path, blobs: dict[str, torch.Tensor], mode: int) -> Part:
    """Writes a safetensors file, which must not exist yet, with the file mode `mode`. Returns the name, size and header
    digest of the file as a Part.

    `blobs` is a dict from key to contiguous CPU tensor; the key is a hash of the tensor's content.
    """
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


def split_parts(blobs: dict[str, torch.Tensor]) -> Sequence[dict[str, torch.Tensor]]:
    """Divides `blobs`, a dict from key to tensor, into the contents of data files of at most 256 MiB (PART_BYTES) each.

    Keeps their order. A file has at most 32768 tensors (PART_BLOBS); a tensor larger than 256 MiB has a file of its
    own.
    """
    parts: list[dict[str, torch.Tensor]] = []
    filled = 0
    for key, tensor in blobs.items():
        if not parts or filled + tensor.nbytes > PART_BYTES or len(parts[-1]) >= PART_BLOBS:
            parts.append({})
            filled = 0
        parts[-1][key] = tensor
        filled += tensor.nbytes
    return parts
