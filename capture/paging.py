"""Frees resident memory: asks the kernel to drop the pages of memory-mapped weights."""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

# MADV_PAGEOUT (Linux 5.4): swaps out anonymous pages, and drops file pages from the page cache of all processes
_PAGE_OUT = 21


def page_out(weight: Tensor) -> None:
    """Drops the pages of `weight`, a tensor in a memory-mapped file, from resident memory.

    The tensor keeps its values, because using them reads the file again. Does nothing outside Linux, or if torch itself
    allocated the memory of `weight`.
    """
    if sys.platform != "linux" or weight.device.type != "cpu" or weight.untyped_storage().resizable():
        return
    first, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:  # an older kernel refuses; the pages then stay, which is harmless
        advice = mmap.MADV_DONTNEED if _unmodified(first, end) else _PAGE_OUT
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice))


def _unmodified(first: int, end: int) -> bool:
    """Returns whether all pages of this process between the addresses `first` and `end` still belong to their file.

    A page that was written to may be a private copy, which must not be dropped. The kernel describes each page in
    /proc/self/pagemap by an entry of 64 bits: bit 61 says that the page belongs to a file or is shared, bit 62 that it
    is swapped, bit 63 that it is in memory (Linux, Documentation/admin-guide/mm/pagemap.rst).
    """
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            pages.seek(first // mmap.PAGESIZE * 8)
            entries = bytearray(pages.read((end - first) // mmap.PAGESIZE * 8))
    except OSError:
        return False
    kinds = (torch.frombuffer(entries, dtype=torch.int64) >> 61) & 7
    copies = (kinds > 1) & (kinds & 1 == 0)
    return len(kinds) * mmap.PAGESIZE == end - first and not bool(copies.any())
