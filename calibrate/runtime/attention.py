"""Attention on a CPU: by Octavo's own kernel for bfloat16, for other dtypes by oneDNN's matrix products.

torch uses MKL's matrix products, which are slow on processors that are not Intel's. Here some rows of scores are
computed at a time: the weights exp(score - shift) are multiplied with the values, and the product is divided by the sum
of each row's weights (Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021). The shift is the largest
score of the row. Scores and sums are float32.
"""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from . import kernels

_AT_ONCE = 1 << 22  # scores computed at once: products of fewer rows are slow, more scores do not fit in the cache
_LEAST_SCORES = 1 << 18  # with fewer scores in a head, torch's attention is faster than oneDNN's products
_LEAST_SCORES_KERNEL = 1 << 11  # with fewer scores in a head, torch's attention is faster than Octavo's kernel
_LOG2E = math.log2(math.e)  # factor from exponents of e to exponents of 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that Octavo's attention accepts


@cache
def is_quick() -> bool:
    """Returns whether Octavo's attention is faster than torch's on this CPU: it has AVX-512, but no AMX, for which
    torch has fast kernels."""
    wide = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
    return wide and not torch.cpu._is_amx_tile_supported()


class Attention(TorchFunctionMode):
    """A mode in which calls of `F.scaled_dot_product_attention` run Octavo's attention where it is faster."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            func = torch.unflatten  # torch.compile does not follow the method through a mode
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return _attended(*args, **kwargs)
        return (_in_graph if _fits_graph(*args, **kwargs) else func)(*args, **kwargs)

    def enter(self, model: nn.Module, *_: Any) -> None:
        """Enters the mode before a forward of `model` on a CPU; a pre-hook. A mode that is still active, because the
        forward before was interrupted, is not entered again."""
        first = next(model.parameters(), None)
        if (first is None or first.device.type == "cpu") and _get_current_function_mode() is not self:
            self.__enter__()

    def leave(self, *_: Any) -> None:
        """Leaves the mode after a forward, also after one that raised an exception; a forward hook."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)


def _attended(*args: Any, **kwargs: Any) -> Tensor:
    y: Tensor = (attention if is_faster(*args, **kwargs) else F.scaled_dot_product_attention)(*args, **kwargs)
    return y


def _have_the_same_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.ndim >= 3 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fits_graph(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> bool:
    """Returns whether a graph of torch.compile can contain the operator `octavo::attention` for these inputs: the
    output's shape is known from them, and no gradients are needed."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    return _have_the_same_heads(query, key, value) and not _needs_gradients(*tensors)


@torch.library.custom_op("octavo::attention", mutates_args=())
def _in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    output = _attended(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    y = _empty(query, value)
    return output if output.stride() == y.stride() else y.copy_(output)


@_in_graph.register_fake
def _empty(query: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    # memory has all heads of a row side by side, the layout in which models read the output next
    y = query.new_empty((*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]))
    return y.transpose(-2, -3)


def attend(model: nn.Module, enabled: bool) -> None:
    """Makes forwards of `model` use Octavo's attention where it is faster, or only torch's if not `enabled`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Attention)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if enabled:
        mode = Attention()
        model.register_forward_pre_hook(mode.enter)
        model.register_forward_hook(mode.leave, always_call=True)


def is_faster(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Returns whether `attention` supports this call of torch's function and is faster."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if dropout_p or is_causal or enable_gqa or not is_quick() or torch.is_autocast_enabled("cpu"):
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.is_nested for x in tensors):
        return False
    if _needs_gradients(*tensors):
        return False
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    heads, rows, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    fits = _have_the_same_heads(query, key, value) and keys == value.shape[-2] and query.shape[-1] == key.shape[-1]
    if not fits or not (query.numel() and value.numel()) or rows * keys < _least_scores(query.dtype):
        return False
    if attn_mask is None:
        return True
    full_shape = (*heads, rows, keys)[-attn_mask.ndim :]
    broadcastable = 2 <= attn_mask.ndim <= query.ndim and all(
        size in (1, full_size) for size, full_size in zip(attn_mask.shape, full_shape, strict=True)
    )
    return broadcastable and attn_mask.dtype in (torch.bool, query.dtype)


def _kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    return kernels.library() if dtype == torch.bfloat16 else None


def _least_scores(dtype: torch.dtype) -> int:
    """Returns the smallest number of scores in a head for which Octavo's attention is faster than torch's."""
    return _LEAST_SCORES if _kernels(dtype) is None else _LEAST_SCORES_KERNEL


@torch.compiler.disable
@torch.no_grad()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes softmax(query @ key.T * scale + mask) @ value in the dtype of `query`, for calls that `is_faster`
    accepts.

    query (..., rows, d), key (..., keys, d), value (..., keys, e) -> (..., rows, e). Rows whose keys are all masked
    become zeros, as in torch. The arguments are those of F.scaled_dot_product_attention.
    """
    *heads, rows, width = query.shape
    scale = (width**-0.5 if scale is None else scale) * _LOG2E
    if scale < 0:
        query, scale = -query, -scale
    mask = None if attn_mask is None else _in_base_2(attn_mask, key.shape[-2]).expand(*heads, rows, -1)
    y = _empty(query, value)
    library = _kernels(query.dtype)
    if library is not None and scale:
        query, key, value = (_by_batch(_side_by_side(x)) for x in (query, key, value))
        kernels.attention(library, query, key, value, None if mask is None else _by_batch(mask), _by_batch(y), scale)
    else:
        _by_products(query, key, value, mask, y, scale)
    return y


def _side_by_side(x: Tensor) -> Tensor:
    """Returns `x` with contiguous rows: `x` itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_batch(x: Tensor) -> Tensor:
    """Reshapes `x` (..., heads, rows, columns) to have exactly one axis before the heads."""
    return x.unsqueeze(0) if x.ndim == 3 else x.flatten(0, -4)


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, y: Tensor, scale: float) -> None:
    """Computes attention by oneDNN's matrix products and stores it in `y`. `mask` and `scale` belong to scores to base
    2: weights are 2 ** score."""
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


def _pieces(rows: int, keys: int) -> Iterator[slice]:
    step = max(64, _AT_ONCE // keys)
    return (slice(start, start + step) for start in range(0, rows, step))


def _in_base_2(mask: Tensor, keys: int) -> Tensor:
    """Returns the mask to add to scores to base 2, (..., keys). Finite numbers stay finite: a row masked by the lowest
    float32 everywhere has equal scores, and is not fully masked."""
    mask = mask.expand(*mask.shape[:-1], keys)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    largest = torch.finfo(torch.float32).max
    return torch.where(mask.isinf(), mask, (mask.float() * _LOG2E).clamp_(-largest, largest)).contiguous()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T, (rows, out), for x (rows, in) and weight (out, in)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y
