"""Runs a model on recorded calls, with errors that name the call."""

import inspect
import itertools
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from octavo.capture.errors import DeviceError, MisfitError, OctavoError

from ..errors import out_of_memory

T = TypeVar("T")


class Call(Protocol):
    """The arguments of one call of a model, such as a `capture.store.unit.Call`; `unit`, `step` and `index` are
    optional."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...


Calls = Callable[[], Iterable[Call]]


class Progress(Protocol):
    """Wraps an iterable to show the progress through its items."""

    def __call__(self, label: str, items: Iterable[T], total: int | None = None, /) -> Iterable[T]: ...


def silent(label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """A Progress that shows nothing."""
    return items


def describe(call: Call, position: int) -> str:
    """Names a call as a capture does (prompt 3, step 5), or by its position, counted from 1."""
    unit, step = getattr(call, "unit", None), getattr(call, "step", None)
    where = f"call {position + 1}" if unit is None else f"prompt {unit + 1}"
    return where if step is None else f"{where}, step {step}"


def first(calls: Calls, samples: int | None) -> Iterator[Call]:
    """The first `samples` calls, or all."""
    return itertools.islice(iter(calls()), samples)


def taken(calls: Calls, positions: Collection[int]) -> Iterator[Call]:
    """The calls at these positions."""
    return (call for at, call in enumerate(first(calls, max(positions, default=-1) + 1)) if at in positions)


class Stopped(Exception):
    """Raised inside a forward to skip the rest of it."""


def replaced(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """Returns `value` with `change` applied to every object of type `kind` in its containers."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: replaced(item, kind, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, kind, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, kind, change) for item in value)
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Returns `value` with its tensors on `device`."""
    return replaced(value, Tensor, lambda tensor: tensor.to(device))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules in eval mode without gradients while inside; afterwards each module is in its earlier mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_caches(model: nn.Module) -> None:
    """Raises MisfitError when a diffusers cache would skip blocks, whose layers then receive no data."""
    if getattr(model, "is_cache_enabled", False):
        raise MisfitError(f"{type(model).__name__}: a cache skips some of its blocks. Call disable_cache() first.")


def run(model: nn.Module, call: Call, position: int) -> Any:
    """The model's output for a call; None where a hook or module raised Stopped.

    Raises MisfitError for arguments that the forward does not take and for an error inside the forward, with the layer
    that raised; DeviceError when memory runs out. An OctavoError of a hook is raised again with the call's name first.
    """
    where = describe(call, position)
    device = device_of(model)
    args, kwargs = moved(call.args, device), moved(call.kwargs, device)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise MisfitError(f"{where}: {type(model).__name__}.forward: {error}. Capture with this model.") from error
    try:
        return model(*args, **kwargs)
    except Stopped:
        return None
    except OctavoError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise _explained(model, where, device, error) from error


def _explained(model: nn.Module, where: str, device: torch.device, error: Exception) -> OctavoError:
    if out_of_memory(error) is not None:
        return DeviceError(f"out of memory on {device} at {where}. Use fewer layers, a smaller size or another device.")
    layer = _layer_of(model, error)
    place = f"{where}, layer {layer}" if layer else where
    fact = " ".join(str(error).split()) or type(error).__name__
    return MisfitError(f"{place}: {fact.rstrip('.')}. Capture with this model.")


def _layer_of(model: nn.Module, error: Exception) -> str:
    """The name of the innermost module that was running when `error` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), "") or found
    return found


def spread(count: int, wanted: int) -> list[int]:
    """Picks `wanted` of the positions 0 to `count` - 1, spaced evenly; all where there are no more."""
    if wanted >= count:
        return list(range(count))
    return [(2 * at + 1) * count // (2 * wanted) for at in range(wanted)]
