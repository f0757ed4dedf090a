"""Frees resident memory: lets the kernel drop pages of mapped weight files that are no longer read."""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

# MADV_PAGEOUT of Linux 5.4: swaps out pages without a file; file pages leave the page cache, for all processes
_PAGE_OUT = 21


def page_out(weight: Tensor) -> None:
    """Drops a weight that is part of a mapped file from resident memory.

    The file stays mapped as long as any of its tensors lives, and the values stay: reading them reads the file again.
    Does nothing outside Linux, and for memory that torch allocated itself.
    """
    if sys.platform != "linux" or weight.device.type != "cpu" or weight.untyped_storage().resizable():
        return
    first, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:  # an older kernel refuses, which is no harm
        advice = mmap.MADV_DONTNEED if _as_the_file(first, end) else _PAGE_OUT
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice))


def _as_the_file(first: int, end: int) -> bool:
    """Whether all pages between two addresses are pages of their file: a page that was written to may be a copy.

    Bits 61 to 63 of an entry mean: of a file or shared, swapped, present (Linux,
    Documentation/admin-guide/mm/pagemap.rst).
    """
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            pages.seek(first // mmap.PAGESIZE * 8)
            read = bytearray(pages.read((end - first) // mmap.PAGESIZE * 8))
    except OSError:
        return False
    kinds = (torch.frombuffer(read, dtype=torch.int64) >> 61) & 7
    copies = (kinds > 1) & (kinds & 1 == 0)
    return len(kinds) * mmap.PAGESIZE == end - first and not bool(copies.any())
