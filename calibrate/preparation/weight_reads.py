"""Finds layers whose weight is used by more than their own forward: by a function or another module, or changed by it.

An integer weight in that place would be read as a float one. The weight that a tied embedding shares stays float beside
the integer layer, so an owner of the parameter may read it.
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

READ = "its weight is used outside of calls of the layer"
CHANGED = "its weight is set by each call of the model"


def weights_used_elsewhere(model: nn.Module, call: Call, names: Iterable[str]) -> dict[str, str]:
    """The named layers whose weight a call uses elsewhere or changes, with the reason. Runs the call once; raises as
    `replay.calls.run` does."""
    with evaluating(model), watching(model, names) as reasons:
        run(model, call, 0)
    return reasons


@contextmanager
def watching(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Watches the weights of the named layers while inside; afterwards the dict has the layers whose weight was used
    elsewhere or changed, with the reason."""
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
    """Address and version of a tensor; a tensor made in inference mode has no version."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _changed(after: Tensor, before: Tensor, state: tuple[int, int | None]) -> bool:
    return after is not before or _state(after) != state


class _Watch(TorchDispatchMode):
    """Notes the addresses of weights that operations use while no owner of the weight runs."""

    def __init__(self, addresses: set[int]) -> None:
        super().__init__()
        self._places, self._running = addresses - {0}, list[set[int]]()  # an empty tensor has the address 0
        self.foreign = set[int]()

    def owned(self, module: nn.Module) -> set[int]:
        """The addresses of the weights among the parameters of the module itself."""
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
