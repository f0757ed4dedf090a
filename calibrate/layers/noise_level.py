"""The noise level of the current call of a denoiser, for layers with one range for each timestep bin.

A denoiser receives the noise level as its time argument (mostly `timestep`), which is a monotone function of sigma and
the same function for any number of steps. So ranges of bins that were calibrated in 28 steps also apply in 20 or 50.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.call_arguments import TIME_ARGUMENTS, bind
from octavo.capture.errors import MisfitError


class NoiseLevel:
    """Stores the noise level of a denoiser's call, from `record` to `clear`. All layers of the denoiser share one
    object.

    A copy of a denoiser has its own NoiseLevel: the hooks are methods of this object, which is copied with the modules.
    """

    def __init__(self) -> None:
        self._levels: Tensor | None = None  # float32, 0-d where all rows share one level, else (rows,)

    @classmethod
    def of(cls, levels: Tensor | None) -> "NoiseLevel":
        """Makes an object with fixed noise levels, for rows passed to a single layer outside its denoiser."""
        noise = cls()
        noise._levels = levels
        return noise

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the noise level of a call; a forward pre-hook of the denoiser."""
        try:
            args, named = bind(inspect.signature(module.forward), args, kwargs)
        except TypeError:
            return  # the forward that follows raises the error
        self._levels = levels_of(named)

    def clear(self, *_: Any) -> None:
        """Clears the noise level after a call; a forward hook of the denoiser that also runs after an exception."""
        self._levels = None

    def bins(self, edges: Tensor, rows: int | None) -> Tensor:
        """Returns the bins of the current call: (rows,) where each of the `rows` rows has its own noise level, else
        0-d.

        Where the number of rows differs from the number of noise levels, the largest level applies to all rows. Raises
        MisfitError outside a call, and in a call without a time argument.
        """
        levels = self._levels
        if levels is None:
            names = " or ".join(TIME_ARGUMENTS[:2])
            raise MisfitError(
                f"noise level: unknown in this call. Call the whole denoiser with {names}, not one layer."
            )
        if levels.ndim and len(levels) != rows:
            levels = levels.max()
        return bins_of(levels.to(edges.device), edges)


def bins_of(levels: Tensor, edges: Tensor) -> Tensor:
    """Returns the index of each noise level's bin: the number of edges not above the level."""
    return torch.bucketize(levels.to(torch.float32), edges, right=True)


def levels_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Returns the time argument of a call as float32: 0-d where all its numbers are equal, else 1-d; None without a
    time argument."""
    for name in TIME_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float32)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            levels = value.detach().flatten().to(torch.float32)
            return levels[0] if bool((levels == levels[0]).all()) else levels
    return None


def attach(model: nn.Module) -> tuple[NoiseLevel, Callable[[], None]]:
    """Attaches a NoiseLevel to `model`; returns the NoiseLevel and a function that detaches it. Where `model` already
    has one, returns that one and a function that does nothing."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, NoiseLevel):
            return owner, lambda: None
    noise = NoiseLevel()
    handles = (
        model.register_forward_pre_hook(noise.record, with_kwargs=True),
        model.register_forward_hook(noise.clear, always_call=True),
    )

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return noise, detach
