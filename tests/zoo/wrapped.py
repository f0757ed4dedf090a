"""Modules around a small denoiser, as users and libraries wrap them."""

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
    """A wrapper as users write them for logging or caching; its child has the name that DataParallel gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Straight(Decorated):
    """A wrapper that calls the forward of its child, past the child's hooks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class Reordering(Decorated):
    """A wrapper that receives its arguments in another order than its child."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(args[1], args[0], **kwargs)


class Scaling(Decorated):
    """A wrapper that changes an argument in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args[0].mul_(2)
        return self.module(*args, **kwargs)


class Twice(nn.Module):
    """A wrapper with two modules to choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Denoiser(), Denoiser()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.first(*args, **kwargs)


def graph(module: nn.Module) -> Any:
    """The module after torch.compile."""
    return torch.compile(module, backend="eager", fullgraph=True)


def graph_in_place(module: nn.Module) -> nn.Module:
    """The module, compiled in place."""
    module.compile(backend="eager", fullgraph=True)
    return module


def replaced_forward(module: nn.Module) -> nn.Module:
    """The module with another forward, which says what it wraps."""
    before = module.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    module.forward = forward
    return module


# wrappers that are looked through: the module inside is the model
SEEN_THROUGH: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": graph,
    "compiled DataParallel": lambda module: nn.DataParallel(graph(module)),
}
# what else may stand between a caller and the signature of a denoiser
NAMING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "compile in place": graph_in_place,
    "accelerate's hook": lambda module: add_hook_to_module(module, ModelHook()),
    "functools.wraps": replaced_forward,
    "a class": Decorated,
    "two classes": lambda module: Decorated(Decorated(module)),
    "a class around DataParallel": lambda module: Decorated(nn.DataParallel(module)),
}
