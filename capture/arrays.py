"""Reads safetensors files as numpy arrays, checking sizes before use. Importing this module does not import torch."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from .errors import damage
from .sealed import open_regular, pread
from .store.headers import HEADER_LIMIT, READABLE_NAMES, Stored, tensors_of

LARGE = 1 << 18  # bytes; a tensor of this size or more is read into memory pages of its own

Array = np.ndarray[Any, Any]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Reads the header of a safetensors file; returns a dict from tensor name to Stored, and the metadata.

    A Stored is the tensor's dtype, shape and place in the file. Raises FileError if the file is damaged, or if its
    tensors do not cover the rest of the file without gap or overlap.
    """
    with open_regular(path) as (descriptor, size):
        prefix = bytearray(min(8, size))
        pread(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise damage(path, "truncated or not a safetensors file")
        text = bytearray(length)
        pread(descriptor, memoryview(text), 8, path)
    try:
        entries = json.loads(bytes(text))
        metadata = entries.pop("__metadata__", {})
        tensors = tensors_of(entries, 8 + length, size, READABLE_NAMES)
        return tensors, {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damage(path, f"damaged ({error})") from error


def check_memory(path: Path, stored: Stored) -> None:
    """Raises FileError if the tensor that `stored` describes, in the file at `path`, exceeds this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if stored.bytes > memory:
        fact = f"has a tensor of {stored.bytes >> 30} GiB, more than this machine's memory of {memory >> 30} GiB"
        raise damage(path, fact, "Copy the file again or use a machine with more memory.")


def read_into(path: Path, stored: Stored, memory: memoryview) -> None:
    """Fills `memory` with the bytes of the tensor that `stored` describes, from the file at `path`.

    `memory` has the size of the tensor.
    """
    if stored.bytes:
        with open_regular(path) as (descriptor, _):
            pread(descriptor, memory, stored.offset, path)


def read_array(path: Path, stored: Stored) -> Array:
    """Reads from the file at `path` the tensor that `stored` describes, as a numpy array.

    bfloat16 becomes float32 with the same values. A tensor of 256 KiB (LARGE) or more gets memory pages of its own,
    which return to the system when the array is freed. Raises FileError if the tensor is larger than the memory of this
    machine, TypeError for a float dtype of 8 bits.
    """
    dtype = np.dtype(np.uint16 if stored.dtype == "bfloat16" else stored.dtype)
    check_memory(path, stored)
    memory = bytearray(stored.bytes) if stored.bytes < LARGE else mmap.mmap(-1, stored.bytes)
    read_into(path, stored, memoryview(memory))
    array = np.frombuffer(memory, dtype).reshape(stored.shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "bfloat16" else array
