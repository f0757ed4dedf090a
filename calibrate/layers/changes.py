"""Finds what a layer does besides the computation of its class: it has hooks, its forward was replaced, or its weight
is computed (as with a parametrization).

An integer layer that replaces such a layer would not do these things, so the layer stays float. Two kinds of hooks are
no obstacle. Hooks of the backward pass and of state dicts do not change the output. Hooks of the modules that contain
the layer run as before, because these modules are not replaced.
"""

from typing import Any

from torch import nn
from torch.nn.modules import module
from torch.nn.utils import parametrize

_METHODS = ("forward", "_conv_forward")  # the methods in which linears and convolutions compute their output


def change_of(layer: nn.Module) -> str:
    """Returns the reason why an integer layer cannot replace `layer`, such as a forward hook or a weight that is
    computed before each call; "" if there is none."""
    hooks = [_name(hook) for hook in layer._forward_pre_hooks.values()]
    if "weight" not in layer._parameters:
        if parametrize.is_parametrized(layer, "weight"):
            return "its weight is parametrized"
        return f"its weight is computed by {hooks[0]} before each call" if hooks else "its weight is not a parameter"
    if parametrize.is_parametrized(layer):
        return "its bias is parametrized"
    for method in _METHODS:
        if method in vars(layer) and not _is_own_method(layer, method):
            return f"its {method} was replaced"
        if _is_patched(layer, method):
            return f"{method} of its class was replaced"
    hooks += [_name(hook) for hook in layer._forward_hooks.values()]
    return f"the forward hook {hooks[0]} would be lost" if hooks else ""


def hooks_on_all_modules() -> str:
    """Returns a warning if torch runs forward hooks around every module (register_module_forward_hook), else ""."""
    if not (module._global_forward_hooks or module._global_forward_pre_hooks):
        return ""
    return "torch runs forward hooks around every module, integer layers too; a checkpoint cannot hold these hooks."


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).rpartition("<locals>.")[2]


def _is_own_method(layer: nn.Module, method: str) -> bool:
    """Returns whether the attribute `method` of the object `layer` is the method of the layer's class, bound to the
    layer, and nothing else. accelerate sets such an attribute; it changes nothing. `layer` must have the attribute
    itself, and not only through its class."""
    bound = vars(layer)[method]
    return getattr(bound, "__self__", None) is layer and bound.__func__ is getattr(type(layer), method)


def _is_patched(layer: nn.Module, method: str) -> bool:
    """Returns whether someone replaced `method` in the class nn.Linear or nn.Conv2d, whichever `layer` is an instance
    of. A method counts as replaced if its function was not defined in the Python module that defines the class."""
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(layer, kind) and hasattr(kind, method):
            function = getattr(kind, method)
            return getattr(function, "__globals__", {}).get("__name__") != kind.__module__
    return False
