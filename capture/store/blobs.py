"""Tensors as blobs of bytes: which tensors can be stored, their memory, and statistics of their numbers."""

import math
from collections.abc import Sequence

import torch

from ..errors import Unstorable
from .headers import WORDS
from .stats import NO_STATS, Stats

# dtypes that can be stored, by their names in the safetensors format
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, word) for name, word in WORDS.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT16_MAX = torch.finfo(torch.float16).max
MAX_ROWS = 64  # a tensor with more rows is stored as one blob
MIN_ROW_BYTES = 1024  # a tensor with smaller rows is stored as one blob: each row's key and entry take space


def unsupported(tensor: torch.Tensor) -> str | None:
    """The reason why `tensor` cannot be stored; None when it can."""
    if tensor.is_quantized:
        return f"is a quantized tensor ({tensor.dtype})"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"is a {str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_meta:
        return "is a meta tensor without values"
    if tensor.dtype not in NAMES:
        return f"is a tensor of {tensor.dtype}"
    return None


def settle(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Returns `tensor` detached, contiguous and in CPU memory, and True when that memory is a copy of its own."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    settled = plain.cpu().contiguous()
    return settled, settled.data_ptr() != tensor.data_ptr()


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor from the outermost in memory to the innermost; None for the usual order and for
    expanded tensors. A channels-last input runs through other kernels than a contiguous one, which round differently.
    """
    strides = [(stride, at) for at, stride in enumerate(tensor.stride()) if tensor.shape[at] > 1]
    ordered = [at for _, at in sorted(strides, key=lambda each: -each[0])]
    if ordered == sorted(ordered) or any(stride == 0 for stride, _ in strides):
        return None
    return (*(at for at in range(tensor.ndim) if tensor.shape[at] <= 1), *ordered)


def rows_of(settled: torch.Tensor) -> Sequence[torch.Tensor] | None:
    """The rows of dim 0, where storing rows one by one can pay: both halves of classifier-free guidance are the same
    latents. For a single picture or video its channels: the channels of a condition are the same at every step. None
    where the tensor is stored as one blob."""
    found = settled[0] if settled.ndim > 3 and settled.shape[0] == 1 else settled
    shape = found.shape
    if len(shape) < 2 or not 2 <= shape[0] <= MAX_ROWS or found.nbytes // shape[0] < MIN_ROW_BYTES:
        return None
    return found.unbind(0)


def memory_of(settled: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy; writable where the tensor is."""
    if settled.numel() == 0:
        return memoryview(bytearray())
    flat = settled.as_strided((settled.numel(),), (1,))  # a dimension of size 1 may have any stride
    return flat.view(torch.uint8).numpy().data


def stats_of(settled: torch.Tensor) -> Stats | None:
    """The Stats of a float tensor, or of the real and imaginary parts of a complex one; None for other dtypes."""
    if settled.is_complex():
        settled = torch.view_as_real(settled)
    if not settled.is_floating_point():
        return None
    if settled.numel() == 0:
        return NO_STATS
    if settled.dtype.itemsize == 1:
        settled = settled.float()
    low, high = (value.item() for value in settled.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        nonfinite, saturated = 0, 0
        if settled.dtype == torch.float16 and max(high, -low) >= FLOAT16_MAX:
            saturated = int((settled.abs() >= FLOAT16_MAX).sum())
        return Stats(low + 0.0, high + 0.0, nonfinite, saturated)  # never -0.0, which would depend on the order
    finite = settled[settled.isfinite()]
    inner = stats_of(finite) or NO_STATS
    return inner._replace(nonfinite=settled.numel() - finite.numel())


def check_storable(tensor: torch.Tensor, path: str, owner: str = "") -> None:
    """Raises Unstorable, naming the input, for a tensor that cannot be stored."""
    fact = unsupported(tensor)
    if fact is not None:
        raise Unstorable(owner, path, fact)
