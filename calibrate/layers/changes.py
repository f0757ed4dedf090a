"""Tells what a layer does besides its weight: hooks, a replaced forward, a weight that is computed.

An integer layer in its place would do none of that, so such a layer stays float. Hooks of the backward pass and of
state dicts change no output, and hooks of modules around the layer stay where they are.
"""

from typing import Any

from torch import nn
from torch.nn.modules import module
from torch.nn.utils import parametrize

_METHODS = ("forward", "_conv_forward")  # the methods by which linears and convolutions compute


def change_of(layer: nn.Module) -> str:
    """Why `layer` computes something else than its class does, or an integer layer cannot take its place; "" where
    neither is so."""
    hooks = [_name(hook) for hook in layer._forward_pre_hooks.values()]
    if "weight" not in layer._parameters:
        if parametrize.is_parametrized(layer, "weight"):
            return "its weight is parametrized"
        return f"its weight is computed by {hooks[0]} before each call" if hooks else "its weight is no parameter"
    if parametrize.is_parametrized(layer):
        return "its bias is parametrized"
    for method in _METHODS:
        if method in vars(layer) and not _own(layer, method):
            return f"its {method} was replaced"
        if _patched(layer, method):
            return f"{method} of its class was replaced"
    hooks += [_name(hook) for hook in layer._forward_hooks.values()]
    return f"the forward hook {hooks[0]} would be lost" if hooks else ""


def hooks_on_all_modules() -> str:
    """A warning where torch runs forward hooks around every module, or ""."""
    if not (module._global_forward_hooks or module._global_forward_pre_hooks):
        return ""
    return "torch runs forward hooks around every module, integer layers too; no checkpoint holds them."


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).rpartition("<locals>.")[2]


def _own(layer: nn.Module, method: str) -> bool:
    """Whether the method that stands on the layer itself is that of its class, as accelerate leaves it."""
    bound = vars(layer)[method]
    return getattr(bound, "__self__", None) is layer and bound.__func__ is getattr(type(layer), method)


def _patched(layer: nn.Module, method: str) -> bool:
    """Whether a method of torch's own class was replaced by a function of another module."""
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(layer, kind) and hasattr(kind, method):
            function = getattr(kind, method)
            return getattr(function, "__globals__", {}).get("__name__") != kind.__module__
    return False
