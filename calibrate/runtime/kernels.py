"""Python bindings of kernels.c, which is compiled when Octavo is installed; without the library torch computes."""

import ctypes
import hashlib
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = SOURCE.with_name("libkernels.so")
NARROW = {torch.float32: 0, torch.bfloat16: 1}  # dtypes that the kernel quantizes, and its argument `narrow` for each

_TENSORS = ("query", "key", "value", "mask", "y")
_log = logging.getLogger(__name__)


class _Attention(ctypes.Structure):
    """The arguments of the attention kernel, laid out as the struct in kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("at", ctypes.c_int64 * 3 * 5),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "keys", "width", "out")),
        ("scale", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, or where they do not fit this processor or this kernels.c."""
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported() and LIBRARY.exists()):
        return None
    try:
        kernels = ctypes.CDLL(str(LIBRARY))
        digest = ctypes.c_char_p.in_dll(kernels, "source").value
    except (OSError, ValueError) as error:
        _log.warning("%s: %s. Integers run without it, more slowly.", LIBRARY, error)
        return None
    if digest != hashlib.sha256(SOURCE.read_bytes()).hexdigest().encode():
        _log.warning("%s: not of this kernels.c. Integers run without it, more slowly: install Octavo again.", LIBRARY)
        return None
    kernels.attention_scratch.restype = ctypes.c_long
    return kernels


def attention(
    kernels: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
) -> None:
    """Computes y = softmax(query @ key.T * scale + mask) @ value.

    All tensors are (batch, heads, rows, columns) with contiguous rows, in bfloat16 but for `mask`, which is float32.
    `mask` and the positive `scale` are to base 2.
    """
    (batch, heads, rows, width), (keys, out) = query.shape, value.shape[2:]
    call = _Attention(batch=batch, heads=heads, rows=rows, keys=keys, width=width, out=out, scale=scale)
    for index, tensor in enumerate((query, key, value, mask, y)):
        if tensor is not None:
            setattr(call, _TENSORS[index], tensor.data_ptr())
            call.at[index][:] = tensor.stride()[:3]
    threads = torch.get_num_threads()
    scratch = torch.empty(kernels.attention_scratch(ctypes.byref(call), threads), dtype=torch.uint8)
    kernels.attention(ctypes.byref(call), ctypes.c_void_p(scratch.data_ptr()), threads)


def quantize(kernels: ctypes.CDLL, x: Tensor, out: Tensor, scale: float, zero_point: int) -> None:
    """Computes out = clamp(round(x / scale + zero_point) + 128, 0, 255) for contiguous tensors, `x` of a dtype in
    NARROW."""
    kernels.quantize(
        ctypes.c_void_p(x.data_ptr()), NARROW[x.dtype], ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()),
        ctypes.c_float(scale), zero_point, torch.get_num_threads(),
    )  # fmt: skip
