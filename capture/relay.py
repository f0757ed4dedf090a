"""Names for positional arguments that a module takes as *args and passes on to the one module inside it."""

import inspect
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .wrappers import compiled, inside


def callee_of(module: nn.Module) -> nn.Module | None:
    """The module to which `module` can only pass its *args on: its only child, or the only child of that one, and so
    on, until there are names. None for a module without *args or with several children, and for a compiled one, whose
    calls of its child are part of a graph."""
    if compiled(module):
        return None
    found = inside(module)
    while _variadic(found):
        children = list(found.children())
        if len(children) != 1:
            return None
        found = inside(children[0])
    return None if found is inside(module) else found


def _variadic(module: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


class Passed(NamedTuple):
    """The arguments of a call, and the versions of the tensors among them, which count changes in place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """The arguments as they are now."""
        return cls(args, kwargs, _versions(args, kwargs))

    @property
    def changed(self) -> bool:
        """Whether a tensor among the arguments was changed in place since."""
        return _versions(self.args, self.kwargs) != self.versions

    def same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether another call has the very same objects as its arguments."""
        return (
            len(args) == len(self.args)
            and all(one is other for one, other in zip(args, self.args, strict=True))
            and kwargs.keys() == self.kwargs.keys()
            and all(kwargs[name] is value for name, value in self.kwargs.items())
        )


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The versions of the tensors in arguments; tensors of inference mode have none."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
