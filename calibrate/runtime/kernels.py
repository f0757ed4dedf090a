"""Python bindings of the kernels in native/, which are compiled when Octavo is installed. Without them torch computes.

The library holds the kernels once for each target: a set of vector instructions. The best one that this processor runs
is used; the environment variable OCTAVO_KERNELS names another target, or "none".
"""

import ctypes
import hashlib
import logging
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from octavo.capture.errors import UsageError

SOURCES = Path(__file__).with_name("native")
LIBRARY = Path(__file__).with_name("libkernels.so")
TARGETS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "avx2")  # best first
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the number by which kernels know a dtype

_TENSORS = ("query", "key", "value", "mask", "y")
_log = logging.getLogger(__name__)


class _Attention(ctypes.Structure):
    """The arguments of an attention kernel, with the memory layout of the struct in native/attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("at", ctypes.c_int64 * 3 * 5),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "keys", "width", "out")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class _Sums(ctypes.Structure):
    """The arguments of `add_sums`, with the memory layout of the struct in native/sums.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("steps", "errors", "gram", "residual")),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("is_double", ctypes.c_int32),
    )


class Kernels:
    """The kernels of one target. `target`: its name, one of TARGETS. `computes_in_bfloat16`: whether it has the
    bfloat16 attention kernel."""

    def __init__(self, library: ctypes.CDLL, target: str) -> None:
        self.target = target
        self.computes_in_bfloat16 = target == "avx512_bf16"
        self._library = library
        sized = ["attention", "add_sums", *(["bfloat16_attention"] if self.computes_in_bfloat16 else [])]
        for name in sized:
            self._function(f"{name}_scratch").restype = ctypes.c_long

    def _function(self, name: str) -> "ctypes._NamedFuncPointer":
        return getattr(self._library, f"{name}_{self.target}")

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> bool:
        """Computes y = softmax(query @ key.T * scale + mask) @ value from products of integers, and returns whether `y`
        is valid: not if a number is NaN, infinite or above 1e15.

        All tensors are (batch, heads, rows, columns) with stride 1 in the last dimension. `mask` is float32, the others
        have the same dtype, a key of TYPES. `mask` and `scale`, which is not negative, belong to scores to base 2: the
        weights of the softmax are 2 ** score.
        """
        return bool(self._attend("attention", query, key, value, mask, y, scale))

    def bfloat16_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> None:
        """Computes the same as `attention` for bfloat16 tensors, from products of bfloat16 numbers. `scale` is
        positive."""
        self._attend("bfloat16_attention", query, key, value, mask, y, scale)

    def _attend(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> int:
        (batch, heads, rows, width), (keys, out) = query.shape, value.shape[2:]
        call = _Attention(batch=batch, heads=heads, rows=rows, keys=keys, width=width, out=out, scale=scale)
        call.type = TYPES[query.dtype]
        for index, tensor in enumerate((query, key, value, mask, y)):
            if tensor is not None:
                setattr(call, _TENSORS[index], tensor.data_ptr())
                call.at[index][:] = tensor.stride()[:3]
        return self._call(name, call)

    def _call(self, name: str, call: ctypes.Structure) -> int:
        """Calls a kernel that needs scratch memory and uses several threads."""
        threads = torch.get_num_threads()
        scratch = torch.empty(self._function(f"{name}_scratch")(ctypes.byref(call), threads), dtype=torch.uint8)
        return int(self._function(name)(ctypes.byref(call), ctypes.c_void_p(scratch.data_ptr()), threads))

    def add_sums(self, steps: Tensor, errors: Tensor, scale: float, gram: Tensor, residual: Tensor) -> None:
        """Computes gram += scale ** 2 * steps.T @ steps, only on and above the diagonal, and residual += scale *
        steps.T @ errors. Below the diagonal the numbers of `gram` become arbitrary.

        `steps` are whole numbers from -255 to 255. Both `steps` and `errors` are (rows, in), float32 and contiguous;
        `gram` and `residual` (in, in) are contiguous and both float32 or both float64. The products of `steps` are
        exact. For each column and 512 rows, `errors` are rounded to multiples of 1 / 16383 of their largest magnitude.
        """
        call = _Sums(*(tensor.data_ptr() for tensor in (steps, errors, gram, residual)), *steps.shape, scale)
        call.is_double = gram.dtype == torch.float64
        self._call("add_sums", call)

    def quantize(self, x: Tensor, out: Tensor, scale: float, zero_point: int) -> None:
        """Computes out = clamp(round(x / scale + zero_point) + 128, 0, 255). Both tensors are contiguous; `x` has a
        dtype of TYPES, `out` is uint8."""
        self._function("quantize")(
            ctypes.c_void_p(x.data_ptr()), TYPES[x.dtype], ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()),
            ctypes.c_float(scale), zero_point, torch.get_num_threads(),
        )  # fmt: skip


def digest(folder: Path) -> str:
    """Returns the SHA-256 digest, in hexadecimal, of the names and contents of the C files in `folder`."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@cache
def library() -> Kernels | None:
    """Loads the compiled kernels of the best target that this processor runs, or of the one that OCTAVO_KERNELS names.
    Returns None if there are none, if the variable is "none", or if they were compiled from other C files.

    Raises UsageError for an unknown name, and for a target that this processor cannot run or that was not compiled.
    """
    name = os.environ.get("OCTAVO_KERNELS") or "best"
    if name not in ("best", "none", *TARGETS):
        raise UsageError(f"OCTAVO_KERNELS: {name!r} is unknown. Choose one of best, none, {', '.join(TARGETS)}.")
    usable = targets()
    if name in TARGETS and name not in usable:
        raise UsageError(
            f"OCTAVO_KERNELS: {name!r} cannot run here. Choose one of {', '.join(['best', 'none', *usable])}."
        )
    if name == "none" or not usable:
        return None
    return usable[name] if name in TARGETS else next(iter(usable.values()))


@cache
def targets() -> dict[str, Kernels]:
    """Returns the kernels of each target that was compiled and that this processor runs, by name, best first."""
    loaded = _load()
    if loaded is None:
        return {}
    names = [name for name in TARGETS if loaded.runs(name.encode()) and hasattr(loaded, f"attention_{name}")]
    return {name: Kernels(loaded, name) for name in names}


@cache
def _load() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        compiled_from = ctypes.c_char_p.in_dll(loaded, "source").value
    except (OSError, ValueError) as error:
        _log.warning("%s: cannot be loaded (%s). Models run without it, more slowly.", LIBRARY, error)
        return None
    if compiled_from != digest(SOURCES).encode():
        fact = "was compiled from other C files, so models run without it, more slowly"
        _log.warning("%s: %s. Install Octavo again.", LIBRARY, fact)
        return None
    return loaded


def absence() -> str | None:
    """Returns a text that says why `library` returns None; None if there is a library."""
    if library() is not None:
        return None
    if os.environ.get("OCTAVO_KERNELS") == "none":
        return "none: OCTAVO_KERNELS is none"
    if not LIBRARY.exists():
        return "none: they were not compiled. Install Octavo again where there is a C compiler"
    if _load() is not None:
        return "none: this processor has neither AVX2 nor AVX-512 with VNNI"
    return f"none: {LIBRARY} cannot be used. Install Octavo again"
