"""Computes attention on a CPU, in several ways, which are called candidates. The module choice.py measures which
candidate is the fastest on this processor.

torch's attention uses MKL's matrix products, which are slow on processors that are not Intel's, and in bfloat16 and
float16 on processors without instructions for these. In Octavo's own forms some rows of scores are computed at a time:
the weights exp(score - shift) are multiplied with the values, and the product is divided by the sum of each row's
weights (Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021). The shift is the largest score of the
row. Scores and sums are float32.

All candidates have the arguments query (..., rows, d), key (..., keys, d) and value (..., keys, e). The arguments
`attn_mask` and `scale` are those of F.scaled_dot_product_attention. All candidates return (..., rows, e) in the dtype
of `query`. Rows whose keys are all masked become zeros, as in torch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that candidates other than torch accept
_AT_ONCE = 1 << 22  # scores computed at once: products of fewer rows are slow, more scores do not fit in the cache
_LOG2E = math.log2(math.e)  # factor from exponents of e to exponents of 2


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)


def _by_torch_in_float32(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
    return _by_torch(query.float(), key.float(), value.float(), mask, scale).to(query.dtype)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Computes attention in bfloat16 by the kernel of native/bfloat16.c. If the kernel is missing or the scale is 0,
    computes it by oneDNN's products instead. `query`, `key`, `value`, `attn_mask` and `scale` are those of
    F.scaled_dot_product_attention."""
    library = kernels.library()
    query, mask, scale = _in_base_2(query, key, attn_mask, scale)
    if library is None or not library.computes_in_bfloat16 or not scale:  # the kernel needs a positive scale
        return _products(query, key, value, mask, scale)
    y = empty_output(query, value)
    library.bfloat16_attention(*_for_kernel(query, key, value, mask), _by_batch(y), scale)
    return y


def _by_integers(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor | None:
    """Computes attention by the kernel of native/attention.c. `query`, `key`, `value`, `attn_mask` and `scale` are
    those of F.scaled_dot_product_attention.

    Returns None if there is no kernel, if memory ran out, or if a number is NaN, infinite (except -infinity in the
    mask) or too large: a magnitude above 1e15 in `query` or `key`, or above 1e25 in `value`. The caller then uses
    another candidate.
    """
    library = kernels.library()
    if library is None or (
        attn_mask is not None and attn_mask.is_floating_point() and not (attn_mask < math.inf).all()
    ):
        return None
    query, mask, scale = _in_base_2(query, key, attn_mask, scale)
    y = empty_output(query, value)
    return y if library.attention(*_for_kernel(query, key, value, mask), _by_batch(y), scale) else None


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Computes attention by oneDNN's matrix products. `query`, `key`, `value`, `attn_mask` and `scale` are those of
    F.scaled_dot_product_attention."""
    query, mask, scale = _in_base_2(query, key, attn_mask, scale)
    return _products(query, key, value, mask, scale)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Computes attention by oneDNN's matrix products. `query` is (..., rows, d), `key` (..., keys, d) and `value` (...,
    keys, e); `mask`, None or (..., rows, keys), is added to the scores. The weight of a score s is 2 ** s; for the
    usual weights e ** s, the caller multiplies `scale` and `mask` by log2(e)."""
    y = empty_output(query, value)
    rows, keys = y.shape[-2], key.shape[-2]
    for index in itertools.product(*map(range, y.shape[:-2])):
        head, values = key[index].float().contiguous(), value[index].float().contiguous()
        for piece in _pieces(rows, keys):
            scores = _product(query[index][piece].float() * scale, head)
            if mask is not None:
                scores.add_(mask[index][piece])
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest.masked_fill_(largest == -math.inf, 0.0)).exp2_()
            total = weights.sum(-1, keepdim=True)
            y[index][piece] = _product(weights, values.t()).div_(total.masked_fill_(total == 0, 1.0))
    return y


def _pieces(rows: int, keys: int) -> Iterator[slice]:
    step = max(64, _AT_ONCE // keys)
    return (slice(start, start + step) for start in range(0, rows, step))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T, (rows, out), for x (rows, in) and weight (out, in)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Returns memory for the output (..., heads, rows, e) of attention on `query` and `value`. In memory the axes have
    the order (..., rows, heads, e), because models next read all heads of a row together."""
    y = query.new_empty((*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]))
    return y.transpose(-2, -3)


def _in_base_2(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor | None, float]:
    """Converts arguments of F.scaled_dot_product_attention for kernels that compute the weight of a score s as 2 ** s,
    not e ** s. Returns the query, the mask and the scale. The scale and the mask are multiplied by log2(e). If the
    scale is negative, the scale and the query change their sign. The mask becomes float numbers (..., rows, keys) to
    add to scores.

    Finite numbers of a mask stay finite. So a row whose mask is the lowest float32 number everywhere still has equal
    weights for all keys, and does not count as fully masked.
    """
    scale = (query.shape[-1] ** -0.5 if scale is None else scale) * _LOG2E
    if scale < 0:
        query, scale = -query, -scale
    if mask is not None:
        shape = *query.shape[:-1], key.shape[-2]
        mask = mask.expand(*mask.shape[:-1], shape[-1])
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        else:
            largest = torch.finfo(torch.float32).max
            mask = torch.where(mask.isinf(), mask, (mask.float() * _LOG2E).clamp_(-largest, largest)).contiguous()
        mask = mask.expand(shape)
    return query, mask, scale


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_batch(x: Tensor) -> Tensor:
    """Reshapes `x` (..., heads, rows, columns) to (batch, heads, rows, columns): joins all axes before the heads, or
    adds one of length 1 if there are none."""
    return x.unsqueeze(0) if x.ndim == 3 else x.flatten(0, -4)


def _for_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value = (_by_batch(_side_by_side(x)) for x in (query, key, value))
    return query, key, value, None if mask is None else _by_batch(mask)


def _has_bfloat16_kernel() -> bool:
    library = kernels.library()
    return library is not None and library.computes_in_bfloat16


class Candidate(NamedTuple):
    """A way to compute attention: the function `run`, which returns None for inputs that it does not support, and
    `fits`, which returns whether this machine can run it for inputs of a dtype."""

    run: Callable[..., Tensor | None]
    fits: Callable[[torch.dtype], bool]


CANDIDATES = {
    "torch": Candidate(_by_torch, lambda dtype: True),
    "torch in float32": Candidate(_by_torch_in_float32, lambda dtype: dtype in DTYPES[1:]),
    "oneDNN products": Candidate(_by_products, lambda dtype: torch.backends.mkldnn.is_available()),
    "bfloat16 kernel": Candidate(_by_kernel, lambda dtype: dtype == torch.bfloat16 and _has_bfloat16_kernel()),
    "integers": Candidate(_by_integers, lambda dtype: dtype in DTYPES and kernels.library() is not None),
}
# what `accelerate` accepts as `attention`: the candidates that each word allows
ATTENTION = {
    "auto": tuple(CANDIDATES),
    "float": tuple(name for name in CANDIDATES if name != "integers"),
    "integers": ("integers",),
    "torch": ("torch",),
}
