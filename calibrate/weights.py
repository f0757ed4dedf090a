"""Weights to integers: one symmetric scale for each output channel."""

import ctypes
import math
import mmap
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CalibrateError
from .scheme import STORABLE, WEIGHT, QParams, quantize

_SMALLEST = 2.0**-126  # of the normal float32
# MADV_PAGEOUT of Linux 5.4: swaps what is not in a file; the file leaves the page cache, for all processes
_PAGE_OUT = 21


class QuantizedWeight(NamedTuple):
    """`weight` int8 of the shape of the float one; `scale` float32 (out,). A channel of zeros has scale 1."""

    weight: Tensor
    scale: Tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CalibrateError 6 when a tensor holds NaN or infinities; `name` is the tensor's."""
    if not finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CalibrateError(f"{name}: {bad} of {tensor.numel()} values not finite. Check the model's files.", 6)


def finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinities."""
    if tensor.dtype not in STORABLE or not tensor.numel():
        return bool(tensor.isfinite().all())
    low, high = torch.aminmax(tensor.detach())  # 15 to 60 times as fast, without a mask; both ends of NaN are NaN
    return math.isfinite(low) and math.isfinite(high)


def round_to_nearest(
    weight: Tensor, inputs: object = None, *, iterations: int = 0, seed: int = 0
) -> QuantizedWeight | None:
    """Each channel's largest value becomes 127 (or -127), every other one the nearest whole number.

    Of what a method is given it uses the weight alone; it costs 4 out in flops. None where a channel is so small that
    float32 has no scale for it.
    """
    scale = scales_of(weight)
    if scale is None:
        return None
    return QuantizedWeight(quantize(weight.detach(), QParams(scale, torch.zeros_like(scale)), WEIGHT), scale)


def scales_of(weight: Tensor) -> Tensor | None:
    """The scale (out,) of each channel, float32; None where float32 has none for one."""
    flat = weight.detach().reshape(weight.shape[0], -1)
    largest = torch.maximum(flat.amax(1), flat.amin(1).neg()).to(torch.float64)
    scale = (largest / WEIGHT.qmax).to(torch.float32)
    zero = largest == 0
    if bool(((scale < _SMALLEST) & ~zero).any()):
        return None
    scale[zero] = 1.0
    return scale


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
