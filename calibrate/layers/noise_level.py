"""Records the noise level of the current call of a denoiser, for layers with one range for each timestep bin (an
interval of noise levels).

A denoiser receives the noise level as its time argument, mostly `timestep`. This argument is a monotone function of
sigma alone, whatever the number of denoising steps. So ranges calibrated in 28 steps also apply in 20 or 50.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.call_arguments import TIME_ARGUMENTS, bind
from octavo.capture.errors import MisfitError


class NoiseLevel:
    """Stores the noise level of a denoiser's call while the call runs, for all integer layers of the denoiser.

    `record` and `clear` are hooks of the denoiser, before and after each call. A deep copy of the denoiser has a
    NoiseLevel of its own, because copying a hook, which is a method of a NoiseLevel, also copies this NoiseLevel.
    """

    def __init__(self) -> None:
        self._levels: Tensor | None = None  # float32, 0-d where all rows share one level, else (rows,)

    @classmethod
    def of(cls, levels: Tensor | None) -> "NoiseLevel":
        """Makes a NoiseLevel with fixed `levels`, to run a single layer outside its denoiser: 0-d, (rows,) with one
        level for each row of the layer's input, or None for a layer that needs none."""
        noise = cls()
        noise._levels = levels
        return noise

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the noise level of a call, as a forward pre-hook of the denoiser."""
        try:
            args, named = bind(inspect.signature(module.forward), args, kwargs)
        except TypeError:
            return  # the forward that follows raises the error
        self._levels = levels_of(named)

    def clear(self, *_: Any) -> None:
        """Clears the noise level after a call, as a forward hook of the denoiser that also runs after an exception."""
        self._levels = None

    def bins(self, edges: Tensor, rows: int | None) -> Tensor:
        """Returns the index of the current call's timestep bin, among the bins that `edges` separate. The result is
        0-d, or (rows,) if the call has a noise level for each of the `rows` rows of a layer's input.

        `rows` is None for an input without an axis of rows. If the call has several noise levels, but not one for each
        row, or if `rows` is None, the largest level applies to the whole input. Raises MisfitError outside a call of
        the denoiser, and in a call without a time argument.
        """
        levels = self._levels
        if levels is None:
            names = " or ".join(TIME_ARGUMENTS[:2])
            raise MisfitError(
                f"the noise level of this call is unknown. Call the whole denoiser with {names}, not one layer."
            )
        if levels.ndim and len(levels) != rows:
            levels = levels.max()
        return bins_of(levels.to(edges.device), edges)


def bins_of(levels: Tensor, edges: Tensor) -> Tensor:
    """Returns, for each of the noise `levels`, the index of its timestep bin: the number of `edges` less than or equal
    to the level."""
    return torch.bucketize(levels.to(torch.float32), edges, right=True)


def levels_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Returns the time argument (the noise level) of a denoiser's call as float32; None if the call has none.
    `arguments` is a dict from name to argument. A time argument whose numbers are all equal becomes 0-d, any other
    1-d."""
    for name in TIME_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float32)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            levels = value.detach().flatten().to(torch.float32)
            return levels[0] if bool((levels == levels[0]).all()) else levels
    return None


def attach(model: nn.Module) -> tuple[NoiseLevel, Callable[[], None]]:
    """Attaches a NoiseLevel to `model` with hooks that record each call's noise level. Returns the NoiseLevel and a
    function that removes the hooks. If `model` already has a NoiseLevel, returns the existing one and a function that
    does nothing."""
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
