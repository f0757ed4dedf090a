"""Models that cast what they are given to the dtype of a weight: where that is int8, little would be left of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.scheme import INT8
from ..plan import layer_at
from ..replay.calls import Call, device_of, evaluating, moved

REASON = "the model casts its inputs to the dtype of this weight"


def cast_to(model: nn.Module, call: Call, names: Sequence[str]) -> dict[str, str]:
    """Those of the layers that would be given integers if the weights of all of them were int8, with the reason to
    leave them float. The call is made with such answers about the weights; how it ends does not matter."""
    found: dict[str, str] = {}

    def heard(name: str, dtype: torch.dtype) -> Any:
        def hear(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                found[name] = REASON
                return (args[0].to(dtype), *args[1:])
            return None

        return hear

    layers = {name: layer_at(model, name) for name in names}
    handles = [each.register_forward_pre_hook(heard(name, each.weight.dtype)) for name, each in layers.items()]
    try:
        with evaluating(model), _Int8({id(layer.weight) for layer in layers.values()}):
            model(*moved(call.args, device_of(model)), **moved(call.kwargs, device_of(model)))
    except Exception:  # whatever integers lead to; as it is, the call is made later
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Int8(TorchFunctionMode):
    """Inside, tensors of these ids say that they are int8."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self._ids = ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and id(args[0]) in self._ids:
            if getattr(func, "__self__", None) is torch.Tensor.dtype:
                return INT8.dtype
            if func in (torch.Tensor.is_floating_point, torch.is_floating_point):
                return False
        return func(*args, **(kwargs or {}))
