"""Python bindings of kernels.c, which is compiled when Octavo is installed. Without the library torch computes."""

import ctypes
import hashlib
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = SOURCE.with_name("libkernels.so")
NARROW = {torch.float32: 0, torch.bfloat16: 1}  # by dtype that the kernel can quantize: its argument `narrow`

_TENSORS = ("query", "key", "value", "mask", "y")
_log = logging.getLogger(__name__)


class _Attention(ctypes.Structure):
    """The arguments of the attention kernel, with the memory layout of the struct in kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("at", ctypes.c_int64 * 3 * 5),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "keys", "width", "out")),
        ("scale", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Loads the compiled kernels; returns None if there are none, if this processor cannot run them, or if they were
    compiled from another kernels.c."""
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported() and LIBRARY.exists()):
        return None
    try:
        kernels = ctypes.CDLL(str(LIBRARY))
        digest = ctypes.c_char_p.in_dll(kernels, "source").value
    except (OSError, ValueError) as error:
        _log.warning("%s: cannot be loaded (%s). Integer layers run without it, more slowly.", LIBRARY, error)
        return None
    if digest != hashlib.sha256(SOURCE.read_bytes()).hexdigest().encode():
        fact = "was compiled from another kernels.c, so integer layers run without it, more slowly"
        _log.warning("%s: %s. Install Octavo again.", LIBRARY, fact)
        return None
    kernels.attention_scratch.restype = ctypes.c_long
    return kernels


def absence() -> str | None:
    """Returns a text that says why `library` returns None; None if there is a library."""
    if library() is not None:
        return None
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported()):
        return "none: this processor lacks AVX512_BF16"
    if not LIBRARY.exists():
        return "none: they were not compiled. Install Octavo again where there is a C compiler"
    return f"none: {LIBRARY} cannot be used. Install Octavo again"


def attention(
    kernels: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
) -> None:
    """Computes y = softmax(query @ key.T * scale + mask) @ value with the compiled kernel.

    All tensors are (batch, heads, rows, columns) with stride 1 in the last dimension. `mask` is float32, the others are
    bfloat16. `mask` and the positive `scale` belong to scores to base 2: weights are 2 ** score.
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
    """Computes out = clamp(round(x / scale + zero_point) + 128, 0, 255) with the compiled kernel. Both tensors are
    contiguous; `x` has a dtype of NARROW, `out` is uint8."""
    kernels.quantize(
        ctypes.c_void_p(x.data_ptr()), NARROW[x.dtype], ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()),
        ctypes.c_float(scale), zero_point, torch.get_num_threads(),
    )  # fmt: skip
