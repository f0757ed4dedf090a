"""Explains why a call does not fit a model, and says what to do."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.tensors import dtype_name

_CAPTURED = "Capture again with this model."
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def misfit(model: nn.Module, call: Any) -> str:
    """Returns the text that follows the name of `call` in a message: why the forward of `model` does not take the
    call's arguments, and what to do."""
    forward = f"{type(model).__name__}.forward"
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind in _BY_POSITION]
    variadic = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(call.args) > len(positional) and not variadic:
        takes = f"{len(positional)} ({', '.join(positional)})" if positional else "none by position"
        remedy = "Remove the training targets, or give a dict of keyword arguments."
        return f"has {len(call.args)} inputs, but {forward} takes {takes}. {_remedy(call, remedy)}"
    by_name = [parameter.name for parameter in parameters if parameter.kind in _BY_NAME]
    unknown = [name for name in call.kwargs if name not in by_name]
    if unknown and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        fact = f"has the input '{unknown[0]}', which {forward} does not take"
        return f"{fact} (it takes {', '.join(by_name)}). {_remedy(call, 'Rename or remove the input.')}"
    if repeated := [name for name in positional[: len(call.args)] if name in call.kwargs]:
        return f"has the input '{repeated[0]}' twice. {_remedy(call, 'Give the input once.')}"
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty and parameter.name in by_name
    ]
    missing = [name for name in needed if name not in (*positional[: len(call.args)], *call.kwargs)]
    return f"lacks the input '{', '.join(missing)}' of {forward}. {_remedy(call, 'Add the input.')}"


def likely_remedy(model: nn.Module, call: Any, device: torch.device) -> str:
    """Returns the likely cause of an exception that the forward of `model`, on `device`, raised for `call`, and what to
    do about it."""
    return next(_reasons(model, call, device), _remedy(call, "Give calls that this model takes."))


def _remedy(call: Any, remedy: str) -> str:
    """Returns the remedy to show in a message: to capture again if `call` is from a capture, else the call's own
    remedy, or `remedy` if it has none."""
    if getattr(call, "unit", None) is not None:
        return _CAPTURED
    return str(getattr(call, "remedy", None) or remedy)


def _reasons(model: nn.Module, call: Any, device: torch.device) -> Iterator[str]:
    """Yields likely reasons why a sample of the user's data does not fit the model, each with its remedy. Yields
    nothing for a call that is not from the user's data, or that has a remedy of its own. `device` is where the model
    runs."""
    source, remedy = (getattr(call, name, None) for name in ("source", "remedy"))
    if not source or remedy:
        return
    inputs = {**{str(index): value for index, value in enumerate(call.args)}, **call.kwargs}
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    for name, value in inputs.items():
        plain = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str, list)) for item in value)
        if isinstance(value, str) or (plain and value):
            yield f"Input {name} is a {type(value).__name__}: give a tensor."
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
            own, wanted = dtype_name(value.dtype), dtype_name(dtype)
            yield f"Input {name} is {own}, but the model is {wanted}: give it as {wanted}."
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            yield f"Input {name} is uint8: preprocess it for the model, which is {dtype_name(dtype)}."
    if _runs_as_a_batch(model, call, device):
        yield "The batch axis is missing: give x[None] for each tensor x."


def _runs_as_a_batch(model: nn.Module, call: Any, device: torch.device) -> bool:
    """Returns whether the model runs on `device` when each tensor of the call gets one more axis in front."""

    def widened(value: Any) -> Any:
        return value.to(device, copy=True)[None] if isinstance(value, Tensor) else value

    with suppress(Exception):
        model(*map(widened, call.args), **{name: widened(value) for name, value in call.kwargs.items()})
        return True
    return False
