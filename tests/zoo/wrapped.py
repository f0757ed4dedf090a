"""Modules around a small denoiser, in the ways that users and libraries wrap modules."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Denoiser(nn.Module):
    """A denoiser that is called with positional arguments, as a UNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.proj(sample) * timestep


class PositionalOnly(Denoiser):
    """A denoiser whose arguments cannot be passed by name."""

    def forward(self, sample: Tensor, timestep: Tensor, /, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.proj(sample) * timestep


class Decorated(nn.Module):
    """A wrapper as users write it for logging or caching. Its child has the same name as in DataParallel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Straight(Decorated):
    """A wrapper that calls the forward of its child directly, so that the child's hooks do not run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class Reordering(Decorated):
    """A wrapper that passes its arguments to its child in another order."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(args[1], args[0], **kwargs)


class Scaling(Decorated):
    """A wrapper that changes an argument in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args[0].mul_(2)
        return self.module(*args, **kwargs)


class Twice(nn.Module):
    """A wrapper with two child modules, of which it calls the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Denoiser(), Denoiser()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.first(*args, **kwargs)


def graph(module: nn.Module) -> Any:
    """Returns the module compiled by torch.compile."""
    return torch.compile(module, backend="eager", fullgraph=True)


def graph_in_place(module: nn.Module) -> nn.Module:
    """Compiles the module in place and returns it."""
    module.compile(backend="eager", fullgraph=True)
    return module


def replaced_forward(module: nn.Module) -> nn.Module:
    """Replaces the module's forward by a function with functools.wraps, and returns the module."""
    before = module.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    module.forward = forward
    return module


# wrappers that Octavo removes: the module inside is the model
SEEN_THROUGH: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": graph,
    "compiled DataParallel": lambda module: nn.DataParallel(graph(module)),
}
# other wrappers between a caller and the signature of a denoiser
NAMING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "compile in place": graph_in_place,
    "accelerate's hook": lambda module: add_hook_to_module(module, ModelHook()),
    "functools.wraps": replaced_forward,
    "a class": Decorated,
    "two classes": lambda module: Decorated(Decorated(module)),
    "a class around DataParallel": lambda module: Decorated(nn.DataParallel(module)),
}
