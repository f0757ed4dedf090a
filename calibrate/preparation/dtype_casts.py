"""Finds layers whose input the model itself casts to `layer.weight.dtype`.

If the weight were int8, this cast would make integers of the input, so these layers stay float.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.scheme import INT8
from ..plan import layer_at
from ..replay.calls import Call, copied_to, device_of, evaluating
from ..replay.hooks import hooked
from ..torch_state import calling

REASON = "the model casts its inputs to the dtype of this weight"


def layers_with_cast_inputs(model: nn.Module, call: Call, names: Sequence[str]) -> dict[str, str]:
    """Finds the layers among `names` whose input the model would cast to integers if their weights were int8. Returns a
    dict from layer name to the reason to keep the layer float.

    Runs `call` while the weights of these layers report the dtype int8. Errors of this run are ignored.
    """
    reasons: dict[str, str] = {}

    def hook_for(name: str, dtype: torch.dtype) -> Any:
        def restore(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                reasons[name] = REASON
                return (args[0].to(dtype), *args[1:]), kwargs
            return None

        return restore

    layers = {name: layer_at(model, name) for name in names}
    hooks = {name: hook_for(name, layer.weight.dtype) for name, layer in layers.items()}
    integers = _Int8({id(layer.weight) for layer in layers.values()})
    # errors are ignored: inputs cast to integers may cause some, and the call is run again later, unchanged
    with suppress(Exception), hooked(model, hooks), evaluating(model), calling(), integers:
        model(*copied_to(call.args, device_of(model)), **copied_to(call.kwargs, device_of(model)))
    return reasons


class _Int8(TorchFunctionMode):
    """A mode in which each weight whose id() is in `ids` reports the dtype int8, so that a model that casts an input to
    the dtype of such a weight casts it to int8."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self._ids = ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and id(args[0]) in self._ids:
            if getattr(func, "__self__", None) is torch.Tensor.dtype:
                return INT8.dtype
            if func in (torch.Tensor.is_floating_point, torch.is_floating_point):
                return False
        if func in (torch.Tensor.to, torch.Tensor.type_as) and len(args) > 1 and id(args[1]) in self._ids:
            return args[0].to(INT8.dtype)
        return func(*args, **(kwargs or {}))
