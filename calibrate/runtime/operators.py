"""Makes models on a CPU compute attention, and the linear layers and convolutions that stay float, by the kernels that
the module `choice` measured to be the fastest on this processor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from .attention import CANDIDATES, DTYPES, empty_output
from .choice import (
    LEAST_ROWS,
    LEAST_SCORES,
    MANY_ROWS,
    attention_for,
    attention_gains,
    by_float32,
    in_float32,
    size_class,
)

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class FastOperators(TorchFunctionMode):
    """Runs the chosen kernels in place of torch's functions for attention, linear layers and convolutions, while this
    mode is entered.

    `word`, a key of ATTENTION, limits the kernels for attention. `dtypes` are the dtypes of the model's parameters;
    torch computes linear layers and convolutions of other dtypes.
    """

    def __init__(self, word: str, dtypes: Iterable[torch.dtype]) -> None:
        super().__init__()
        narrow = [dtype for dtype in dtypes if dtype in DTYPES[1:]]
        self.word = word
        # dtypes whose products are computed in float32, as plain values, which graphs of torch.compile can contain
        self.few, self.many, self.convolutions = (
            tuple(dtype for dtype in narrow if in_float32(dtype, kind))
            for kind in ("few rows", "many rows", "convolution")
        )
        dtypes = narrow or [dtype for dtype in dtypes if dtype in DTYPES]
        self.gains = bool(self.few or self.many or self.convolutions) or any(
            attention_gains(dtype, word) for dtype in dtypes
        )

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            func = torch.unflatten  # torch.compile does not follow the method through a mode
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        if func is not F.scaled_dot_product_attention or self.word == "torch":
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return attended(*args, **kwargs, word=self.word)
        return _in_graph(*args, **kwargs, word=self.word) if _fits_graph(*args, **kwargs) else func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.numel() // max(1, input.shape[-1]) if input.ndim else 0
        dtypes = self.many if rows >= MANY_ROWS else self.few
        if rows >= LEAST_ROWS and _is_plain(dtypes, input, weight, bias):
            return by_float32(F.linear, input, weight, bias)
        return F.linear(input, weight, bias)

    def _convolution(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not kwargs and _is_plain(self.convolutions, input, weight, bias):
            return by_float32(func, input, weight, bias, *args)
        return func(input, weight, bias, *args, **kwargs)

    def enter(self, model: nn.Module, *_: Any) -> None:
        """Serves as a forward pre-hook of `model`: enters this mode before a forward, if the model is on a CPU. Does
        nothing if the mode is still active, which happens if the previous forward was interrupted."""
        first = next(model.parameters(), None)
        if (first is None or first.device.type == "cpu") and _get_current_function_mode() is not self:
            self.__enter__()

    def leave(self, *_: Any) -> None:
        """Serves as a forward hook: leaves this mode after a forward, even if the forward raised an exception."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)


def _is_plain(dtypes: tuple[torch.dtype, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether a float layer may be computed in float32. This is so if its input `x`, `weight` and `bias` are
    plain tensors or parameters (no subclasses) on a CPU, have the same dtype, which is in `dtypes`, and need no
    gradients. Autocast must be off."""
    if x.dtype not in dtypes or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [x, weight, *([] if bias is None else [bias])]
    plain = all(
        type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" and each.dtype == x.dtype for each in tensors
    )
    return plain and not _needs_gradients(*tensors)


def _have_the_same_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.ndim >= 3 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _fits_graph(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> bool:
    """Returns whether a graph of torch.compile can contain the operator `octavo::attention` for these inputs, the
    arguments of F.scaled_dot_product_attention. It can if the inputs have the same batch and heads and need no
    gradients."""
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
    word: str = "auto",
) -> Tensor:
    output = attended(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, word=word)
    y = empty_output(query, value)
    return output if output.stride() == y.stride() else y.copy_(output)


@_in_graph.register_fake
def _empty(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return empty_output(query, value)


@torch.compiler.disable
def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    word: str = "auto",
) -> Tensor:
    """Computes softmax(query @ key.T * scale + mask) @ value by the candidate that was measured to be fastest. `word`,
    a key of ATTENTION, limits the candidates. The other arguments are those of F.scaled_dot_product_attention. This
    function of torch computes the output if a head has fewer than 2048 (LEAST_SCORES) scores, queries times keys, or if
    the chosen candidate does not support the arguments."""
    scores = query.shape[-2] * key.shape[-2] if query.ndim > 1 and key.ndim > 1 else 0
    if not (dropout_p or is_causal or enable_gqa) and scores >= LEAST_SCORES and _fits(query, key, value, attn_mask):
        for allowed in (word, "float"):  # a candidate in floating point serves where integers cannot
            name = attention_for(query.dtype, size_class(scores), allowed)
            if name == "torch":
                break
            with torch.no_grad():
                output = CANDIDATES[name].run(query, key, value, attn_mask, scale)
            if output is not None:
                return output
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _fits(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Returns whether candidates other than torch's may compute attention for these inputs. They may if all inputs are
    plain tensors (no subclasses), are on a CPU and need no gradients; if `query`, `key` and `value` have the same batch
    and heads and one dtype, which is in DTYPES; if `attn_mask` broadcasts to the scores; and if autocast is off."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if any(type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.is_nested for x in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or _needs_gradients(*tensors):
        return False
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    heads, rows, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    fits = _have_the_same_heads(query, key, value) and keys == value.shape[-2] and query.shape[-1] == key.shape[-1]
    if not fits or not (query.numel() and value.numel()):
        return False
    if attn_mask is None:
        return True
    full_shape = (*heads, rows, keys)[-attn_mask.ndim :]
    broadcastable = 2 <= attn_mask.ndim <= query.ndim and all(
        size in (1, full_size) for size, full_size in zip(attn_mask.shape, full_shape, strict=True)
    )
    return broadcastable and attn_mask.dtype in (torch.bool, query.dtype)


def attend(model: nn.Module, word: str | None) -> None:
    """Makes forwards of `model` on a CPU use the operators that were measured to be fastest on this processor. `word`,
    a key of ATTENTION, limits the candidates for attention. If `word` is None, torch computes all operators."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), FastOperators)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if word is not None:
        mode = FastOperators(word, {parameter.dtype for parameter in model.parameters()})
        if mode.gains:
            model.register_forward_pre_hook(mode.enter)
            model.register_forward_hook(mode.leave, always_call=True)
