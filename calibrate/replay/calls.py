"""Runs a model on recorded calls, and raises errors that name the call."""

import copy
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from octavo.capture.errors import DeviceError, MisfitError, OctavoError

from ..errors import out_of_memory
from ..torch_state import calling
from .misfits import likely_remedy, misfit

T = TypeVar("T")


class Call(Protocol):
    """The arguments of one call of a model, such as a `capture.store.layout.Call`.

    Optional attributes: `unit`, the number of the prompt that the call belongs to; `step`, the denoising step; `index`,
    the number of the call among those of its prompt; `source`, the text that names the call in messages, for calls that
    are not from a capture.
    """

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...


Calls = Callable[[], Iterable[Call]]


class Progress(Protocol):
    """A function that wraps an iterable and shows the progress through its items. Its arguments are a label to show,
    the iterable, and the number of items (None: unknown)."""

    def __call__(self, label: str, items: Iterable[T], total: int | None = None, /) -> Iterable[T]: ...


def silent(label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """Returns `items` unchanged: a Progress that shows nothing."""
    return items


def describe(call: Call, position: int) -> str:
    """Names a call for messages: by the call's `source` if it has one, otherwise by prompt and step, as in "prompt 3,
    step 5". If the prompt is not known, the position takes its place, as in "call 3, step 5"; a step that is not known
    is left out. `position` is counted from 0; prompts and positions are shown counted from 1."""
    unit, step = getattr(call, "unit", None), getattr(call, "step", None)
    if source := getattr(call, "source", ""):
        return str(source)
    where = f"call {position + 1}" if unit is None else f"prompt {unit + 1}"
    return where if step is None else f"{where}, step {step}"


def first(calls: Calls, samples: int | None) -> Iterator[Call]:
    """Returns an iterator over the first `samples` calls; over all calls if `samples` is None."""
    return itertools.islice(iter(calls()), samples)


def calls_at(calls: Calls, positions: Collection[int]) -> Iterator[Call]:
    """Returns an iterator over the calls at these positions, counted from 0, in the order of `calls`."""
    return (call for position, call in enumerate(first(calls, max(positions, default=-1) + 1)) if position in positions)


class Stopped(Exception):
    """An exception that a hook or module raises to end the model's forward early."""


def replaced(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """Returns `value` with every object of type `kind` replaced by `change(object)`, inside dicts, lists and tuples
    too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: replaced(item, kind, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, kind, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, kind, change) for item in value)
    return value


def copied_to(value: Any, device: torch.device) -> Any:
    """Returns a copy of `value` with its tensors on `device`, for a forward that may change its arguments.

    Containers and objects are copied and keep their types. A tensor that occurs several times is copied once. Modules,
    functions and objects that cannot be copied are not copied.
    """
    return _copied(value, device, {})


def _copied(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    if value is None or isinstance(value, (nn.Module, str, bool, int, float)) or callable(value):
        return value
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.to(device, copy=True)
        return memo[id(value)]
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = _copied(item, device, memo)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(item, device, memo) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(item, device, memo) for item in value])
    with suppress(Exception):  # an object that cannot be copied is passed uncopied
        return copy.deepcopy(value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter; the CPU if it has no parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules in eval mode and turns gradients off, inside the `with` statement. Afterwards each module has
    its earlier mode.

    Compiled functions and modules run uncompiled, because graphs do not run hooks. The fused path of torch's
    nn.TransformerEncoderLayer is off, because it reads the weights of its linears without calling them.
    """
    training = [module for module in model.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


def _uncompiled() -> AbstractContextManager[Any]:
    """Returns a context in which torch.compile has no effect. The context does nothing if torch._dynamo was never
    imported, because then nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def check_caches(model: nn.Module) -> None:
    """Raises MisfitError if a diffusers cache is on, which skips blocks so that their layers receive no data."""
    if getattr(model, "is_cache_enabled", False):
        raise MisfitError(f"{type(model).__name__}: the model's cache skips blocks. Call disable_cache() of the model.")


def run(model: nn.Module, call: Call, position: int) -> Any:
    """Runs the model on a copy of a call's arguments and returns its output; None if a hook or module raised Stopped to
    end the forward early. `position` counts the call from 0, for messages.

    Raises MisfitError for arguments that the forward does not take and for an error inside the forward, naming the
    layer that raised the error; DeviceError when memory runs out. An OctavoError of a hook is raised again with the
    name of the call in front of its message.
    """
    call_name = describe(call, position)
    device = device_of(model)
    args, kwargs = copied_to(call.args, device), copied_to(call.kwargs, device)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise MisfitError(f"{call_name} {misfit(model, call)}") from error
    try:
        with calling():
            return model(*args, **kwargs)
    except Stopped:
        return None
    except OctavoError as error:
        raise type(error)(f"{call_name}: {error}") from error
    except Exception as error:
        raise _explained(model, call, call_name, device, error) from error


def _explained(model: nn.Module, call: Call, call_name: str, device: torch.device, error: Exception) -> OctavoError:
    """Returns the OctavoError to raise for `error`, which the forward of `model` raised at the call `call_name`.
    `device` is where the model runs."""
    if out_of_memory(error) is not None:
        return DeviceError(
            f"out of memory on {device} at {call_name}. Use fewer layers, a smaller size or another device."
        )
    layer = _layer_of(model, error)
    place = f"{call_name}, layer {layer}" if layer else call_name
    fact = " ".join(str(error).split()) or type(error).__name__
    return MisfitError(f"{place}: {fact.rstrip('.')}. {likely_remedy(model, call, device)}")


def _layer_of(model: nn.Module, error: Exception) -> str:
    """Returns the name of the innermost module that was running when `error` was raised; "" if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    innermost = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        innermost = names.get(id(frame.f_locals.get("self")), "") or innermost
    return innermost


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Returns `wanted` evenly spaced positions out of 0 to `count` - 1; all positions if `count` is not larger than
    `wanted`."""
    if wanted >= count:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]
