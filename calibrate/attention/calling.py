"""Passes every call of F.scaled_dot_product_attention inside a model to a function, with the name of the module that
makes the call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..replay.hooks import hooked
from .inputs import Inputs

# gets the name of a module and the arguments of its attention; returns the output, or None for that of torch
See = Callable[[str, Inputs], Tensor | None]


class _Mode(TorchFunctionMode):
    def __init__(self, running: list[str], see: See) -> None:
        super().__init__()
        self._running, self._see = running, see

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self._running:
            return func(*args, **kwargs)
        inputs = Inputs.of(*args, **kwargs)
        output = self._see(self._running[-1], inputs) if inputs.query.numel() and inputs.value.numel() else None
        if output is None:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        return output.to(query.dtype).reshape(*query.shape[:-1], inputs.value.shape[-1])


@contextmanager
def attention_passed_to(model: nn.Module, see: See) -> Iterator[None]:
    """Calls `see` at each attention of `model`, inside the `with` statement. The arguments of `see` are the name of the
    innermost module that is running, and the Inputs of the attention. If `see` returns a tensor (batch, heads, rows,
    width of the value), that is the output of the attention; if it returns None, torch computes the output.

    Attention is passed to `see` only if the model computes it by F.scaled_dot_product_attention, and not inside a fused
    module of torch such as nn.MultiheadAttention.
    """
    running: list[str] = []
    names = [name for name, _ in model.named_modules() if name]

    def entering(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leaving(*_: Any) -> None:
        running.pop()

    hooks = {name: entering(name) for name in names}
    with hooked(model, hooks, dict.fromkeys(names, leaving), always_call=True), _Mode(running, see):
        yield
