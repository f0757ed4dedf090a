"""Finds the module inside a wrapper: a module that only passes its arguments on to another module."""

import sys

from torch import nn

# the class of a wrapper, by its module and name, and the attribute that holds the module inside
_ATTRIBUTES = {
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",  # what torch.compile returns
    ("octavo.capture.listener", "Listener"): "module",
}


def inside(module: nn.Module) -> nn.Module:
    """Returns the module inside `module`, through any number of wrappers; `module` itself if it is not a wrapper.

    A wrapper is recognised by its class (_ATTRIBUTES): DataParallel, DistributedDataParallel, AveragedModel, Listener,
    or the class of what torch.compile returns. A module of a subclass that overrides forward is not a wrapper.
    """
    attribute = _attribute(type(module))
    while attribute is not None:
        module = getattr(module, attribute)
        attribute = _attribute(type(module))
    return module


def compiled(module: nn.Module) -> bool:
    """Returns whether `module`, or the module inside it if it is a wrapper, was compiled by torch.compile."""
    attribute = _attribute(type(module))
    whole = attribute == "_orig_mod" or module._compiled_call_impl is not None
    return whole or (attribute is not None and compiled(getattr(module, attribute)))


def _attribute(kind: type[nn.Module]) -> str | None:
    """Returns the name of the attribute in which a wrapper of the class `kind` holds the module inside it; None if
    `kind` is not the class of a wrapper."""
    for (module_name, name), attribute in _ATTRIBUTES.items():
        wrapper = getattr(sys.modules.get(module_name), name, None)  # None if never imported
        if wrapper is not None and issubclass(kind, wrapper) and kind.forward is wrapper.forward:
            return attribute
    return None
