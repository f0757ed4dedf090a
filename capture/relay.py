"""Finds the names of positional arguments that a module takes as *args and passes on to its only child module."""

import inspect
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .wrappers import compiled, inside


def callee_of(module: nn.Module) -> nn.Module | None:
    """Returns the module that receives the *args of `module` and has names for them.

    The search goes from `module` to its only child, to the only child of that child, and so on, until a forward without
    *args. Returns None if `module` does not take *args, if a module on the way has no or several children, and if
    `module` is compiled, because hooks of its child would then become part of the graph.
    """
    if compiled(module):
        return None
    callee = inside(module)
    while _variadic(callee):
        children = list(callee.children())
        if len(children) != 1:
            return None
        callee = inside(children[0])
    return None if callee is inside(module) else callee


def _variadic(module: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


class ArgumentSnapshot(NamedTuple):
    """The arguments of a call, with the version counters of their tensors. A counter changes if its tensor is changed
    in place later."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """Makes a snapshot of the arguments as they are now."""
        return cls(args, kwargs, _versions(args, kwargs))

    @property
    def changed(self) -> bool:
        """True if a tensor among the arguments was changed in place after the snapshot was made."""
        return _versions(self.args, self.kwargs) != self.versions

    def same_objects(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether `args` and `kwargs` hold the same objects as the snapshot, and not only equal ones."""
        return (
            len(args) == len(self.args)
            and all(one is other for one, other in zip(args, self.args, strict=True))
            and kwargs.keys() == self.kwargs.keys()
            and all(kwargs[name] is value for name, value in self.kwargs.items())
        )


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Returns the version counters of all tensors in the arguments. Tensors made in inference mode are left out,
    because they have no counter."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
