"""Python bindings of the kernels of this folder, which installing Octavo compiles; without them torch computes.

The library holds the kernels once for each target: a set of vector instructions. By default the best target that this
processor runs is used. The environment variable OCTAVO_KERNELS can name another target, or be "none" to use no kernels.
"""

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.capture.errors import UsageError

SOURCES = Path(__file__).parent
LIBRARY = Path(__file__).with_name("libkernels.so")
TARGETS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "avx2")  # best first
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the number by which kernels know a dtype

_GELU = {None: 0, "none": 1, "tanh": 2}
_TENSORS = ("query", "key", "value", "mask", "y")
_Ends = ctypes.c_float * 2
_log = logging.getLogger(__name__)


class _Attention(ctypes.Structure):
    """The arguments of an attention kernel, with the memory layout of the struct in native/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("at", ctypes.c_int64 * 3 * 5),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "keys", "width", "out")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class _Linear(ctypes.Structure):
    """The arguments of the kernel for linear layers, with the memory layout of the struct in native/linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "weight", "offset", "scale", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "in_", "out")),
        ("type", ctypes.c_int32),
        ("gelu", ctypes.c_int32),
    )


class Linear:
    """A linear layer that the kernel `function` computes: y = ((codes - 128) @ weight.T + offset) * scale. The kernel
    reads the input's codes as uint8: each is an int8 code plus 128. `weight` (out, in) int8, `offset` (out,) int32
    (None: 0) and `scale` (out,) float32 are contiguous."""

    def __init__(self, function: Callable[..., int], weight: Tensor, offset: Tensor | None, scale: Tensor) -> None:
        self._function, self._tensors = function, (weight, offset, scale)  # the kernel reads their memory
        self._out, columns = weight.shape
        self._call = _Linear(in_=columns, out=self._out, weight=weight.data_ptr(), scale=scale.data_ptr())
        self._call.offset = None if offset is None else offset.data_ptr()

    def __call__(self, codes: Tensor, dtype: torch.dtype, gelu: str | None = None) -> Tensor:
        """Returns y = ((codes - 128) @ weight.T + offset) * scale, (rows, out), in `dtype`: float32, bfloat16 or
        float16. The sums before `scale` are exact int32 numbers. `codes` (rows, in) uint8, contiguous, are the input's
        int8 codes plus 128. If `gelu` is not None, returns GELU of y, with an error of up to 2e-7 * |y|; `gelu` is then
        the argument `approximate` of F.gelu, "none" or "tanh".

        Raises MemoryError where memory ran out.
        """
        y = torch.empty(len(codes), self._out, dtype=dtype, device="cpu")
        call = _Linear.from_buffer_copy(self._call)  # other threads may use this layer at the same time
        call.codes, call.y, call.rows, call.type = codes.data_ptr(), y.data_ptr(), len(codes), TYPES[dtype]
        call.gelu = _GELU[gelu]
        if not self._function(ctypes.byref(call), torch.get_num_threads()):
            raise MemoryError("a linear layer in integers")
        return y


class _Rows(ctypes.Structure):
    """A tensor (batch, rows, columns), with the memory layout of the struct in native/statistics.c."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "columns", "batch_stride", "row_stride")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    )


def _rows_of(x: Tensor) -> tuple[_Rows, Tensor]:
    """Describes `x` (..., columns) to a kernel as a tensor (batch, rows, columns). Returns this description, and the
    tensor whose memory it points to: `x` itself if it has three axes, of which the last has stride 1; otherwise a
    contiguous form of `x`."""
    if x.ndim != 3 or x.stride(2) != 1:
        x = x.reshape(1, -1, x.shape[-1] if x.ndim else 1).contiguous()
    (batch, rows, columns), (batch_stride, row_stride, _) = x.shape, x.stride()
    threads = torch.get_num_threads()
    return _Rows(x.data_ptr(), batch, rows, columns, batch_stride, row_stride, TYPES[x.dtype], threads), x


class RowStatistics(NamedTuple):
    """Holds the smallest and the largest number of a tensor, and the sum and the sum of squares of each row."""

    low: float
    high: float
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]


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
    """The kernels of one target, a set of vector instructions. `target`: the target's name, one of TARGETS.
    `computes_in_bfloat16`: whether there is an attention kernel for bfloat16."""

    def __init__(self, library: ctypes.CDLL, target: str) -> None:
        self.target = target
        self.computes_in_bfloat16 = target == "avx512_bf16"
        self._attention = getattr(library, f"attention_{target}")
        self._linear = getattr(library, f"linear_{target}")
        self._quantize = getattr(library, f"quantize_{target}")
        self._quantize.argtypes = (
            ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_float, ctypes.c_int, ctypes.c_int,
        )  # fmt: skip
        self._rotate = getattr(library, f"rotate_{target}")
        self._rotate.argtypes = (
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int
        )  # fmt: skip
        if self.computes_in_bfloat16:
            self._bfloat16_attention = getattr(library, f"bfloat16_attention_{target}")
        self._row_statistics = getattr(library, f"row_statistics_{target}")
        self._row_statistics.argtypes = (ctypes.c_void_p,) * 4
        self._column_extremes = getattr(library, f"column_extremes_{target}")
        self._add_exactly = getattr(library, f"add_exactly_{target}")
        self._add_sums = getattr(library, f"add_sums_{target}")

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> bool:
        """Computes attention from products of integers. With scores = query @ key.T * scale + mask, each row of `y` is
        the mean of the rows of `value` with the weights 2 ** score. For the usual weights e ** score, the caller
        multiplies `scale` and `mask` by log2(e). Returns True if `y` is valid. Returns False if memory ran out, or if a
        number is NaN, infinite (except -infinity in `mask`) or too large: a magnitude above 1e15 in `query` or `key`,
        or above 1e25 in `value`.

        All tensors are (batch, heads, rows, columns) with stride 1 in the last dimension. `mask` is float32, the others
        are all float32, all bfloat16 or all float16. `scale` is not negative.
        """
        return _attend(self._attention, query, key, value, mask, y, scale)

    def bfloat16_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float
    ) -> None:
        """Computes attention from products of bfloat16 numbers. With scores = query @ key.T * scale + mask, each row of
        `y` is the mean of the rows of `value` with the weights 2 ** score. `scale` is positive. Raises MemoryError
        where memory ran out.

        All tensors are (batch, heads, rows, columns) with stride 1 in the last dimension. `mask` is float32, the others
        are bfloat16.
        """
        if not _attend(self._bfloat16_attention, query, key, value, mask, y, scale):
            raise MemoryError("attention in bfloat16")

    def linear(self, weight: Tensor, offset: Tensor | None, scale: Tensor) -> Linear:
        """Returns an object that computes the linear layer y = ((codes - 128) @ weight.T + offset) * scale with the
        kernel of this target. `weight` (out, in) int8, `offset` (out,) int32 (None: 0) and `scale` (out,) float32 are
        contiguous."""
        return Linear(self._linear, weight, offset, scale)

    def add_sums(self, steps: Tensor, errors: Tensor, scale: float, gram: Tensor, residual: Tensor) -> None:
        """Computes gram += scale ** 2 * steps.T @ steps, only on and above the diagonal, and residual += scale *
        steps.T @ errors. Below the diagonal the numbers of `gram` become arbitrary.

        `steps` are codes minus zero point, whole numbers from -255 to 255. `errors` are the inputs minus the values of
        their codes, steps * scale. Both are (rows, in), float32 and contiguous. `gram` and `residual`, both (in, in),
        are contiguous, and both float32 or both float64. The products of `steps` are exact. The numbers of `errors` are
        rounded: in each column, 512 rows at a time, to multiples of 1 / 16383 of the largest magnitude among these
        rows. Raises MemoryError where memory ran out.
        """
        call = _Sums(*(tensor.data_ptr() for tensor in (steps, errors, gram, residual)), *steps.shape, scale)
        call.is_double = gram.dtype == torch.float64
        if not self._add_sums(ctypes.byref(call), torch.get_num_threads()):
            raise MemoryError("sums for a rounding method")

    def quantize(self, x: Tensor, out: Tensor, scale: float, zero_point: int, factors: Tensor | None = None) -> None:
        """Writes the int8 codes of `x` plus 128, as uint8, into `out`: out = clamp(round(x / scale + zero_point) + 128,
        0, 255). If `factors` (columns,) is not None, x (..., columns) is first multiplied by `factors` in the dtype of
        `x`. `x` is float32, bfloat16 or float16; `x` and `out` are contiguous."""
        count = x.numel()
        columns = count if factors is None else x.shape[-1]
        if factors is not None:
            factors = factors.to(x.dtype).float().contiguous()
        self._quantize(
            x.data_ptr(), TYPES[x.dtype], out.data_ptr(), None if factors is None else factors.data_ptr(),
            count // columns, columns, scale, zero_point, torch.get_num_threads(),
        )  # fmt: skip

    def rotate(self, x: Tensor, size: int) -> Tensor:
        """Returns `x` (..., channels) with each group of `size` channels rotated, as `transforms.Rotate` does. `size`
        is 16, 64 or 256, and divides the number of channels. `x` is float32, bfloat16 or float16."""
        x = x.contiguous()
        y = torch.empty_like(x)
        threads = torch.get_num_threads()
        self._rotate(x.data_ptr(), y.data_ptr(), TYPES[x.dtype], x.numel() // size, size, threads)
        return y

    def extremes(self, x: Tensor) -> tuple[float, float] | None:
        """Returns the smallest and the largest number of `x` (..., columns), with 0.0 in place of -0.0. Returns None if
        a number is NaN or infinite. `x` is not empty, and float32, bfloat16 or float16."""
        rows, _owner = _rows_of(x)
        ends = _Ends()
        finite = self._row_statistics(ctypes.byref(rows), ends, None, None)
        return (ends[0], ends[1]) if finite else None

    def row_statistics(self, x: Tensor) -> RowStatistics | None:
        """Returns the statistics of the rows of `x` (..., columns). Returns None if a number is NaN or infinite. `x` is
        not empty, and float32, bfloat16 or float16. The sums of a row are computed in float64, always in the same
        order."""
        rows, _owner = _rows_of(x)
        count = rows.batch * rows.rows
        ends, memory = _Ends(), bytearray(2 * 8 * count)  # its address is found faster than that of a tensor or array
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if not self._row_statistics(ctypes.byref(rows), ends, start, start + 8 * count):
            return None
        sums = np.frombuffer(memory)
        return RowStatistics(ends[0], ends[1], sums[:count], sums[count:])

    def column_extremes(self, x: Tensor) -> Tensor | None:
        """Returns a float32 tensor (2, columns): the smallest and the largest number of each column of `x`
        (..., columns), with 0.0 in place of -0.0. Returns None if a number is NaN or infinite. `x` is not empty, and
        float32, bfloat16 or float16."""
        rows, _owner = _rows_of(x)
        ends = torch.empty(2, rows.columns, dtype=torch.float32, device="cpu")
        low = ends.data_ptr()
        low_at, high_at = ctypes.c_void_p(low), ctypes.c_void_p(low + 4 * rows.columns)
        return ends if self._column_extremes(ctypes.byref(rows), low_at, high_at) else None

    def exact_units(self, values: NDArray[np.float64]) -> dict[int, int]:
        """Returns the exact sum of `values`, at most 2**36 finite numbers in a contiguous array. The sum is given as a
        dict from exponent to integer: add integer * 2**exponent over its items."""
        bins = np.zeros(2 * 2047, dtype=np.int64)
        numbers, sums = (ctypes.c_void_p(array.ctypes.data) for array in (values, bins))
        self._add_exactly(numbers, ctypes.c_int64(values.size), sums)
        filled = np.flatnonzero(bins)
        exponents = (filled >> 1) - 1075 + 26 * (filled & 1)
        units: dict[int, int] = {}
        for exponent, unit in zip(exponents.tolist(), bins[filled].tolist(), strict=True):
            units[exponent] = units.get(exponent, 0) + unit
        return units


def _attend(
    function: Callable[..., int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    y: Tensor,
    scale: float,
) -> bool:
    """Computes attention of `query`, `key`, `value` and `mask` by `function`, a kernel of the library, and writes it
    into `y`. Returns False if the kernel could not compute it. All tensors are (batch, heads, rows, columns) with
    stride 1 in the last dimension."""
    (batch, heads, rows, width), (keys, out) = query.shape, value.shape[2:]
    call = _Attention(batch=batch, heads=heads, rows=rows, keys=keys, width=width, out=out, scale=scale)
    call.type = TYPES[query.dtype]
    for index, tensor in enumerate((query, key, value, mask, y)):
        if tensor is not None:
            setattr(call, _TENSORS[index], tensor.data_ptr())
            call.at[index][:] = tensor.stride()[:3]
    return bool(function(ctypes.byref(call), torch.get_num_threads()))


def digest(folder: Path) -> str:
    """Returns the SHA-256 digest, in hexadecimal, of the names and contents of the C files in `folder`."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@cache
def library() -> Kernels | None:
    """Loads the compiled kernels of the best target that this processor runs, or of the target that the environment
    variable OCTAVO_KERNELS names.

    Returns None if the variable is "none", if no kernels were compiled, or if this processor runs none of the targets.
    Also returns None, with a warning, if the kernels cannot be loaded or were compiled from other C files than those in
    native/.

    Raises UsageError if the variable has an unknown name, or names a target that this processor cannot run or that was
    not compiled.
    """
    name = os.environ.get("OCTAVO_KERNELS") or "best"
    if name not in ("best", "none", *TARGETS):
        raise UsageError(f"OCTAVO_KERNELS: {name!r} is unknown. Choose one of best, none, {', '.join(TARGETS)}.")
    usable = targets()
    if name in TARGETS and name not in usable:
        raise UsageError(
            f"OCTAVO_KERNELS: {name!r} cannot run on this CPU. Choose one of {', '.join(['best', 'none', *usable])}."
        )
    if name == "none" or not usable:
        return None
    return usable[name] if name in TARGETS else next(iter(usable.values()))


def kernels_for(x: Tensor) -> Kernels | None:
    """Returns the kernels that can read `x`. Returns None if this machine has no kernels to use, or if `x` is not a
    dense tensor on the CPU, is empty, or is not float32, bfloat16 or float16."""
    if x.dtype not in TYPES or x.device.type != "cpu" or x.layout != torch.strided or x.numel() == 0:
        return None
    return library()


@cache
def targets() -> dict[str, Kernels]:
    """Returns the kernels of each target that was compiled and that this processor runs: a dict from the target's name
    to its kernels, the best target first."""
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
        fact = f"cannot be loaded ({error}), so models run without it, more slowly"
        _log.warning("%s: %s. Install Octavo again.", LIBRARY, fact)
        return None
    if compiled_from != digest(SOURCES).encode():
        fact = "was compiled from other C files, so models run without it, more slowly"
        _log.warning("%s: %s. Install Octavo again.", LIBRARY, fact)
        return None
    return loaded


def absence() -> str | None:
    """Returns a text that says why there are no compiled kernels to use; None if there are."""
    if library() is not None:
        return None
    if os.environ.get("OCTAVO_KERNELS") == "none":
        return "none: OCTAVO_KERNELS is none"
    if not LIBRARY.exists():
        return "none: they were not compiled. Install Octavo again where there is a C compiler"
    if _load() is not None:
        return "none: this processor has neither AVX2 nor AVX-512 with VNNI"
    return f"none: {LIBRARY} cannot be used. Install Octavo again"
