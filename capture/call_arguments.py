"""Binds the arguments of a call to their names, and finds the noise level among them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# the names that denoisers give the noise level, the most common first
TIME_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "timestep_ratio", "r")


def noise_level(arguments: Mapping[str, Any]) -> float | None:
    """The time argument of a call as a number, the largest where rows or tokens have their own; None without one."""
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
    """Binds a call: returns (args, kwargs) with every positional argument under its name, where a name exists.

    Raises TypeError when the signature refuses the call.
    """
    named = dict(signature.bind(*args, **kwargs).arguments)
    kinds = {parameter.kind: parameter.name for parameter in signature.parameters.values()}
    if kinds.get(inspect.Parameter.VAR_POSITIONAL) in named or inspect.Parameter.POSITIONAL_ONLY in kinds:
        return args, dict(kwargs)
    named.update(named.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {}))
    return (), named
