"""Finds layers whose weight changes during a call of the model, or is also used outside the layer's own forward, by a
function or another module.

Such code would read an integer weight as if it were a float weight, so these layers stay float. If several modules own
the same parameter, as with a tied embedding, each of them may use the parameter, because the others keep the float
weight beside the integer layer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..plan import layer_at
from ..replay.calls import Call, evaluating, run
from ..replay.hooks import hooked

READ = "its weight is also used outside the layer's forward"
CHANGED = "each call of the model changes its weight"


def weights_used_elsewhere(model: nn.Module, call: Call, names: Iterable[str]) -> dict[str, str]:
    """Runs `call` once, and finds the layers in `names` whose weight changes during the call, or is also used outside
    the layer's own forward. Returns a dict from layer name to the reason why the layer stays float.

    Raises MisfitError for a call that does not fit the model, DeviceError when memory runs out.
    """
    with evaluating(model), watching(model, names) as reasons:
        run(model, call, 0)
    return reasons


@contextmanager
def watching(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Observes the weights of the layers `names` inside the `with` statement. Yields a dict that is filled when the
    body of the statement ends: from the name of each layer whose weight changed, or was also used outside the layer's
    own forward, to the reason to keep the layer float."""
    reasons: dict[str, str] = {}
    layers = {name: layer_at(model, name) for name in names}
    before = {name: (layer.weight, _state(layer.weight)) for name, layer in layers.items()}
    watch = _Watch({layer.weight.data_ptr() for layer in layers.values()})
    owners = [name for name, module in model.named_modules() if watch.owned(module)]
    entering, leaving = dict.fromkeys(owners, watch.enter), dict.fromkeys(owners, watch.leave)
    with hooked(model, entering), hooked(model, after=leaving, always_call=True), watch:
        yield reasons
    for name, (weight, state) in before.items():
        if _changed(layers[name].weight, weight, state):
            reasons[name] = CHANGED
        elif state[0] in watch.foreign:
            reasons[name] = READ


def _state(weight: Tensor) -> tuple[int, int | None]:
    """Returns data_ptr() and the version of `weight`, which show whether its memory was replaced or changed in place;
    the version is None for a tensor made in inference mode."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _changed(after: Tensor, before: Tensor, state: tuple[int, int | None]) -> bool:
    return after is not before or _state(after) != state


class _Watch(TorchDispatchMode):
    """Records which of the observed weights an operation used outside the forwards of the modules that own the weight:
    the set `foreign` has the data_ptr() of each of these weights."""

    def __init__(self, addresses: set[int]) -> None:
        super().__init__()
        self._places, self._running = addresses - {0}, list[set[int]]()  # an empty tensor has the address 0
        self.foreign = set[int]()

    def owned(self, module: nn.Module) -> set[int]:
        return {x.data_ptr() for x in module._parameters.values() if x is not None} & self._places

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(self.owned(module))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self._running[-1] if self._running else set[int]()
        for value in tree_leaves((args, kwargs)):
            if type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.layout is torch.strided:
                address = value.data_ptr()
                if address in self._places and address not in own:
                    self.foreign.add(address)
        return func(*args, **(kwargs or {}))
