"""The noise level of the current call of a denoiser, for layers that have one range for each bin of noise levels.

A denoiser receives the noise level as its time argument (`timestep`, mostly): a monotone function of sigma, the same
function for any number of steps. So ranges of bins found in 28 steps serve 20 or 50 as well.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.call_arguments import TIME_ARGUMENTS, bind
from octavo.capture.errors import MisfitError


class NoiseLevel:
    """Holds the noise level while a denoiser runs, from `hear` to `forget`; the denoiser's layers share one object.

    A copy of a denoiser has its own: the hooks are methods of this object, which is copied with the modules.
    """

    def __init__(self) -> None:
        self._levels: Tensor | None = None  # float32, 0-d where all rows have the same, else (rows,)

    @classmethod
    def of(cls, levels: Tensor | None) -> "NoiseLevel":
        """Holds fixed noise levels, for rows given to a single layer outside its denoiser."""
        noise = cls()
        noise._levels = levels
        return noise

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the noise level of a call, as a forward pre-hook of the denoiser."""
        try:
            args, named = bind(inspect.signature(module.forward), args, kwargs)
        except TypeError:
            return  # the forward itself raises the error
        self._levels = levels_of(named)

    def forget(self, *_: Any) -> None:
        """Clears the noise level after a call, as a forward hook of the denoiser that also runs after an error."""
        self._levels = None

    def bins(self, edges: Tensor, rows: int | None) -> Tensor:
        """The bins of the current call: (rows,) where each of the `rows` rows has its own noise level, else 0-d.

        Where the numbers of rows and of noise levels differ, the largest level counts. Raises MisfitError outside a
        call, or in a call without a time argument.
        """
        levels = self._levels
        if levels is None:
            names = " or ".join(TIME_ARGUMENTS[:2])
            raise MisfitError(f"noise level: not known here. Call the whole denoiser, with {names}; not a layer alone.")
        if levels.ndim and len(levels) != rows:
            levels = levels.max()
        return bins_of(levels.to(edges.device), edges)


def bins_of(levels: Tensor, edges: Tensor) -> Tensor:
    """The bin of each noise level: the number of edges not above the level."""
    return torch.bucketize(levels.to(torch.float32), edges, right=True)


def levels_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """The time argument of a call: float32, 0-d where all its numbers are the same, else 1-d; None without one."""
    for name in TIME_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float32)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            levels = value.detach().flatten().to(torch.float32)
            return levels[0] if bool((levels == levels[0]).all()) else levels
    return None


def attach(model: nn.Module) -> tuple[NoiseLevel, Callable[[], None]]:
    """Attaches a NoiseLevel to `model`; returns it and a function that detaches it. For a model with a NoiseLevel,
    returns that one, and a function that does nothing."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, NoiseLevel):
            return owner, lambda: None
    noise = NoiseLevel()
    handles = (
        model.register_forward_pre_hook(noise.hear, with_kwargs=True),
        model.register_forward_hook(noise.forget, always_call=True),
    )

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return noise, detach
