"""Wrappers: modules that stand around another module and call it with the arguments they receive."""

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
    """The module inside `module`, through any number of wrappers; `module` itself where it is no wrapper.

    Wrappers are known by their class, not by the name of a child. A class that changes the forward of a wrapper is
    no wrapper.
    """
    attribute = _attribute(type(module))
    while attribute is not None:
        module = getattr(module, attribute)
        attribute = _attribute(type(module))
    return module


def compiled(module: nn.Module) -> bool:
    """Whether torch.compile made graphs of `module` as a whole, or of a module inside it."""
    attribute = _attribute(type(module))
    whole = attribute == "_orig_mod" or module._compiled_call_impl is not None
    return whole or (attribute is not None and compiled(getattr(module, attribute)))


def _attribute(kind: type[nn.Module]) -> str | None:
    """The attribute that holds the module inside a wrapper of this class; None for other classes."""
    for (place, name), attribute in _ATTRIBUTES.items():
        wrapper = getattr(sys.modules.get(place), name, None)  # nothing has a class that was never imported
        if wrapper is not None and issubclass(kind, wrapper) and kind.forward is wrapper.forward:
            return attribute
    return None
