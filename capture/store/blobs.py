"""Makes blobs from tensors: checks a tensor, divides it into rows, computes its statistics.

A blob is the bytes of a tensor, or of a row of it, which are stored under their hash.
"""

import math
from collections.abc import Sequence

import torch

from ..errors import Unstorable
from .headers import TORCH_NAMES
from .stats import NO_STATS, Stats

# the dtypes that can be stored, by their names in the safetensors format, and the other way round
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT16_MAX = torch.finfo(torch.float16).max
MAX_ROWS = 64  # a tensor with more rows is stored as one blob
MIN_ROW_BYTES = 1024  # a tensor with smaller rows is stored as one blob, because each row needs a key and an entry


def unsupported(tensor: torch.Tensor) -> str | None:
    """Returns the reason why `tensor` cannot be stored, None if it can be stored."""
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
    """Returns `tensor` detached, contiguous and in CPU memory, and whether it had to be copied for that."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    settled = plain.cpu().contiguous()
    return settled, settled.data_ptr() != tensor.data_ptr()


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the dimensions of a tensor from the outermost in memory to the innermost, None for a contiguous order.

    The order is stored because kernels for channels-last inputs round differently from those for contiguous inputs.
    Expanded tensors (a stride of 0) give None too.
    """
    strides = [(stride, dim) for dim, stride in enumerate(tensor.stride()) if tensor.shape[dim] > 1]
    ordered = [dim for _, dim in sorted(strides, key=lambda item: -item[0])]
    if ordered == sorted(ordered) or any(stride == 0 for stride, _ in strides):
        return None
    return (*(dim for dim in range(tensor.ndim) if tensor.shape[dim] <= 1), *ordered)


def rows_of(settled: torch.Tensor) -> Sequence[torch.Tensor] | None:
    """Divides `settled`, a contiguous CPU tensor, into rows that are stored one by one. Returns None if the tensor is
    stored as one blob: with fewer than 2 or more than 64 rows (MAX_ROWS), or rows of less than 1 KiB (MIN_ROW_BYTES).

    The rows are the slices along dim 0. So if classifier-free guidance passes the same latents twice, they are stored
    once. If dim 0 of a tensor with at least four dims has size 1, as for a single picture or video, the rows are the
    slices along dim 1, its channels. So channels that hold a condition, such as a masked picture, are stored once for
    all steps.
    """
    tensor = settled[0] if settled.ndim > 3 and settled.shape[0] == 1 else settled
    shape = tensor.shape
    if len(shape) < 2 or not 2 <= shape[0] <= MAX_ROWS or tensor.nbytes // shape[0] < MIN_ROW_BYTES:
        return None
    return tensor.unbind(0)


def memory_of(settled: torch.Tensor) -> memoryview:
    """Returns the memory of `settled`, a contiguous CPU tensor, without a copy. Writing to it changes the tensor."""
    if settled.numel() == 0:
        return memoryview(bytearray())
    flat = settled.as_strided((settled.numel(),), (1,))  # a dimension of size 1 may have any stride
    return flat.view(torch.uint8).numpy().data


def stats_of(settled: torch.Tensor) -> Stats | None:
    """Computes the Stats (extremes, number of NaN and Inf) of the tensor `settled`; None for integers and booleans.

    Of a complex tensor, the real and the imaginary parts count as its values.
    """
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
        return Stats(
            low + 0.0, high + 0.0, nonfinite, saturated
        )  # + 0.0 makes -0.0 positive: which zero aminmax finds depends on the order
    finite = settled[settled.isfinite()]
    inner = stats_of(finite) or NO_STATS
    return inner._replace(nonfinite=settled.numel() - finite.numel())


def check_storable(tensor: torch.Tensor, path: str, owner: str = "") -> None:
    """Raises Unstorable for a tensor that cannot be stored.

    The message names the tensor by `path` ("added_cond_kwargs.time_ids") and `owner` ("transformer input").
    """
    fact = unsupported(tensor)
    if fact is not None:
        raise Unstorable(owner, path, fact)
