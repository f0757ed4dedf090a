"""Finds the names of a call's arguments, and the noise level among them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# names of the noise level in the signatures of diffusers' denoisers, the most common first
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "timestep_ratio", "r")


def noise_level(arguments: Mapping[str, Any]) -> float | None:
    """Returns the noise level of a call, None if it has none. `arguments` maps names of arguments to values.

    The noise level is the first of the arguments timestep, timesteps, t, time, sigma, timestep_ratio and r
    (TIME_ARGUMENTS) that is a number or a tensor of numbers. A tensor has a noise level for each sample of the batch or
    each token; the largest is returned.
    """
    for name in TIME_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            return float(value.max())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves the positional arguments of a call into `kwargs`, under their names; returns the resulting (args, kwargs).

    `signature` is the signature of the called function. All arguments stay as they are if some of them belong to a
    parameter *args, or if the signature has positional-only parameters. Raises TypeError when the arguments do not fit
    the signature.
    """
    named = dict(signature.bind(*args, **kwargs).arguments)
    kinds = {parameter.kind: parameter.name for parameter in signature.parameters.values()}
    if kinds.get(inspect.Parameter.VAR_POSITIONAL) in named or inspect.Parameter.POSITIONAL_ONLY in kinds:
        return args, dict(kwargs)
    named.update(named.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {}))
    return (), named
