"""Resident memory: lets the kernel drop pages of mapped weight files that are read no more."""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

# MADV_PAGEOUT of Linux 5.4: swaps what is not in a file; the file leaves the page cache, for all processes
_PAGE_OUT = 21


def page_out(weight: Tensor) -> None:
    """Takes a weight that is read no more out of resident memory, where it is a part of a mapped file.

    Such a file stays mapped as long as any of its tensors lives. The values stay: reading them reads the file again.
    Elsewhere than on Linux, and for memory that torch holds itself, nothing happens.
    """
    if sys.platform != "linux" or weight.device.type != "cpu" or weight.untyped_storage().resizable():
        return
    first, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:  # an older kernel refuses, which is no harm
        advice = mmap.MADV_DONTNEED if _as_the_file(first, end) else _PAGE_OUT
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice))


def _as_the_file(first: int, end: int) -> bool:
    """Whether the pages from an address to another are those of their file: one that was written to may be a copy.

    Bits 61 to 63 of an entry: of a file or shared, swapped, present (Linux, Documentation/admin-guide/mm/pagemap.rst).
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
