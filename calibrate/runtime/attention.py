"""Attention on a CPU by oneDNN's products, a few rows of scores at a time.

torch takes MKL's products, which are slow on processors that are not Intel's. Here rows of weights exp(score - shift)
are multiplied with the values, and the rows of that are divided by their sums (Rabe and Staats, "Self-attention Does
Not Need O(n^2) Memory", 2021). The shift is the largest score of the row, and all is computed in float32.

In bfloat16, where Cauchy and Schwarz bound the scores, the shift is known before them, and the weights are what the
product puts out, rounded once: no exponential can follow a product of oneDNN's, but a sigmoid, which is that of numbers
far below zero. Their sums are more columns of the product with the values.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_AT_ONCE = 1 << 22  # scores: fewer rows make poor products, more leave the cache
_WORTH = 1 << 16  # scores of a head, below which torch is as quick
_BOUND = 60.0  # of scores whose shift is known before them
_BELOW = 8.0  # the sigmoid of -8 is the exponential but for a thirtieth of a bfloat16's rounding
_SMALLEST = 2.0**-80  # sum of weights: what is a millionth of it, times a value, is a normal float32
_FACTORS = 16  # that sums of weights are found with: see _with_factors
_LOG2E = math.log2(math.e)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def is_quick() -> bool:
    """Whether this CPU has AVX-512 and no AMX, for which torch has kernels of its own."""
    wide = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
    return wide and not torch.cpu._is_amx_tile_supported()


@cache
def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


class Attention(TorchFunctionMode):
    """Inside it `F.scaled_dot_product_attention` is that of this file where it can be, and torch's elsewhere."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return _attended(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def enter(self, model: nn.Module, *_: Any) -> None:
        """Before a forward of `model`, unless that is compiled. What was left by an interruption serves again."""
        if torch.compiler.is_compiling():
            return
        first = next(model.parameters(), None)
        if (first is None or first.device.type == "cpu") and _get_current_function_mode() is not self:
            self.__enter__()

    def leave(self, *_: Any) -> None:
        """After it, also when it failed."""
        if not torch.compiler.is_compiling() and _get_current_function_mode() is self:
            self.__exit__(None, None, None)


@torch.compiler.disable
def _attended(*args: Any, **kwargs: Any) -> Tensor:
    y: Tensor = (attention if is_ours(*args, **kwargs) else F.scaled_dot_product_attention)(*args, **kwargs)
    return y


def attend(model: nn.Module, ours: bool) -> None:
    """Makes all attention in forwards of `model` Octavo's, or torch's again."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Attention)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if ours:
        mode = Attention()
        model.register_forward_pre_hook(mode.enter)
        model.register_forward_hook(mode.leave, always_call=True)


def is_ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> bool:
    """Whether `attention` takes this call of torch's function, and is quicker."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if dropout_p or is_causal or options.get("enable_gqa") or not is_quick() or torch.is_autocast_enabled("cpu"):
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.is_nested for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    heads, rows, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    fits = heads == key.shape[:-2] == value.shape[:-2] and keys == value.shape[-2] and query.shape[-1] == key.shape[-1]
    if query.ndim < 3 or not fits or not (query.numel() and value.numel()) or rows * keys < _WORTH:
        return False
    if attn_mask is None:
        return True
    wanted = (*heads, rows, keys)[-attn_mask.ndim :]
    spread = 2 <= attn_mask.ndim <= query.ndim and all(
        a in (1, b) for a, b in zip(attn_mask.shape, wanted, strict=True)
    )
    return spread and attn_mask.dtype in (torch.bool, query.dtype)


@torch.compiler.disable
@torch.no_grad()
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value, in the dtype of `query`; of a call that `is_ours`.

    query (..., rows, d), key (..., keys, d), value (..., keys, e): (..., rows, e). Rows that may look at nothing
    become zeros, as torch's do.
    """
    *heads, rows, width = query.shape
    scale = width**-0.5 if scale is None else scale
    mask = None if attn_mask is None else _in_base_2(attn_mask).expand(*heads, rows, key.shape[-2])
    bounds = abs(scale) * _longest(query) * _longest(key) if mask is None else torch.full(heads, math.inf)
    query, key = query.contiguous(), key.contiguous()
    values = _with_factors(value) if mask is None and query.dtype == torch.bfloat16 else value
    # one row after the other with all its heads, as the models want to have it
    y = torch.empty((*heads[:-1], rows, heads[-1], value.shape[-1]), dtype=query.dtype).transpose(-2, -3)
    for at in itertools.product(*map(range, heads)):
        head = _Head(query[at], key[at], values[at], value.shape[-1], scale, float(bounds[at]))
        for some in _pieces(rows, key.shape[-2]):
            y[at][some] = head.of(some, None if mask is None else mask[at][some])
    return y


def _longest(x: Tensor) -> Tensor:
    """The largest length of a row of `x` (..., rows, d): (...)."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(-1)


def _with_factors(value: Tensor) -> Tensor:
    """More columns, 1, 17/16, 18/16 to 31/16 in every row: weights times those are multiples of the sum of weights.

    Each is rounded to bfloat16, but elsewhere, so that their mean is off by a quarter of one rounding.
    """
    factors = torch.arange(_FACTORS, 2 * _FACTORS, dtype=value.dtype) / _FACTORS
    return torch.cat((value, factors.expand(*value.shape[:-1], -1)), -1)


def _pieces(rows: int, keys: int) -> Iterator[slice]:
    step = max(64, _AT_ONCE // keys)
    return (slice(start, start + step) for start in range(0, rows, step))


class _Head:
    """The attention of one head. `bound` is not below any |score|; `value` may have more than `width` columns."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, width: int, scale: float, bound: float) -> None:
        self.query, self.key, self.value, self.width, self.scale = query, key, value, width, scale
        self.bounded = bound <= _BOUND and query.dtype == torch.bfloat16 and _has_bfloat16()
        if self.bounded:
            self.scaled = query * scale
            self.shift = torch.full((len(key),), -bound - _BELOW, dtype=query.dtype)

    def of(self, some: slice, mask: Tensor | None) -> Tensor:
        """The output of some rows; `mask` is theirs, to base 2."""
        if self.bounded:
            weights = _product(self.scaled[some], self.key, self.shift, "sigmoid")
            y, sums = _product(weights, self.value.t()).tensor_split((self.width,), -1)
            total = sums.sum(-1, keepdim=True, dtype=torch.float32).div_(1.5 * _FACTORS - 0.5)
            self.bounded = bool(total.amin() >= _SMALLEST)
            if self.bounded:
                return y / total
        scores = _product(self.query[some].float() * (self.scale * _LOG2E), self.key.float())
        if mask is not None:
            scores.add_(mask)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest.masked_fill_(largest == -math.inf, 0.0)).exp2_()
        total = weights.sum(-1, keepdim=True)
        value = self.value[:, : self.width].float().contiguous()
        return _product(weights, value.t()).div_(total.masked_fill_(total == 0, 1.0))


def _in_base_2(mask: Tensor) -> Tensor:
    """What is added to the scores. The largest numbers stay finite: a row of them is a row of equals."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    largest = torch.finfo(torch.float32).max
    return torch.where(mask.isinf(), mask, (mask.float() * _LOG2E).clamp_(-largest, largest))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x (rows, in) times weight (out, in), plus bias, `then` a function of it: (rows, out)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return y
