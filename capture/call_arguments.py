"""Finds the names of a call's arguments, and the noise level among them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# names of the noise level in the signatures of diffusers' denoisers, the most common first
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "timestep_ratio", "r")


def noise_level(arguments: Mapping[str, Any]) -> float | None:
    """Returns the noise level of a call with these named arguments; None if there is no such argument.

    It is the first of TIME_ARGUMENTS that is a number or a tensor of numbers. Of a tensor, with a noise level for each
    row or token, the largest value is returned.
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

    All arguments stay as they are if some fall to the signature's *args, or if it has positional-only parameters.
    Raises TypeError when the arguments do not fit the signature.
    """
    named = dict(signature.bind(*args, **kwargs).arguments)
    kinds = {parameter.kind: parameter.name for parameter in signature.parameters.values()}
    if kinds.get(inspect.Parameter.VAR_POSITIONAL) in named or inspect.Parameter.POSITIONAL_ONLY in kinds:
        return args, dict(kwargs)
    named.update(named.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {}))
    return (), named
