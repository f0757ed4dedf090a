"""Replay: the float model runs on the recorded calls, and observers hear what its layers are given.

The hooks hear positional and keyword inputs of any rank; a layer may be called several times in a forward, or with no
rows (an expert without tokens). They change nothing and are gone afterwards.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from octavo.capture.errors import MisfitError, NumbersError
from octavo.capture.ranks import ALONE, Ranks

from ..torch_state import computing
from .calls import Call, check_caches, evaluating, run

_REMEMBERED = 4  # tensors: to_q, to_k and to_v follow each other
NO_HOOKS: Mapping[str, Callable[..., Any]] = MappingProxyType({})


class InputObserver(Protocol):
    """Observes the inputs of a layer, as observers (observers.py) and surveys do."""

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """Reads what is kept of one tensor. Raises ValueError when it is empty or holds values that are not finite."""

    def add(self, reading: Any) -> None:
        """Takes in what `read` returned."""


class Readings:
    """Reads each tensor once, however many layers in a row are given it."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        self._read = read
        self._known: list[tuple[weakref.ref[Tensor], int, Any]] = []

    def of(self, x: Tensor) -> Any:
        """The reading of `x` as it is now."""
        if x.is_inference():  # has no version: a change in place would go unnoticed
            return self._read(x)
        version = x._version
        for ref, read_version, reading in self._known:
            if ref() is x and read_version == version:
                return reading
        reading = self._read(x)
        self._known = [(weakref.ref(x), version, reading), *self._known[: _REMEMBERED - 1]]
        return reading


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear or convolution, however it was called."""
    return args[0] if args else kwargs["input"]


@contextmanager
def hooked(
    model: nn.Module,
    before: Mapping[str, Callable[..., Any]] = NO_HOOKS,
    after: Mapping[str, Callable[..., Any]] = NO_HOOKS,
    *,
    always_call: bool = False,
) -> Iterator[None]:
    """Inside, hooks run before and after the forwards of the named modules; "" is `model` itself.

    A hook is called with the module, its positional and its keyword arguments, and after a forward with the output;
    with `always_call` also after one that failed, whose output is None.
    """
    handles = []
    try:
        for name, hook in before.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(_settled(hook), with_kwargs=True))
        for name, hook in after.items():
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(_settled(hook), with_kwargs=True, always_call=always_call))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _settled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, computing in the state of torch that calibration has."""

    def settled(*args: Any) -> Any:
        with computing():
            return hook(*args)

    return settled


@contextmanager
def axes(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, int]]:
    """Inside, the numbers of axes of the inputs of the named layers are noted; 0 where they change."""
    ranks: dict[str, int] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rank = input_of(args, kwargs).ndim
            ranks[name] = rank if ranks.get(name, rank) == rank else 0

        return record

    with hooked(model, {name: hook_for(name) for name in names}):
        yield ranks


@contextmanager
def observing(model: nn.Module, observers: Mapping[str, InputObserver]) -> Iterator[None]:
    """Inside, each observer observes the inputs of the layer of `model` it is named after.

    What it reads of a tensor is shared with those that have the same `key`, by default its class.

    A forward inside raises NumbersError for an input that is not finite.
    """
    shared: dict[Any, Readings] = {}

    def hook_for(name: str, observer: InputObserver) -> Callable[..., None]:
        readings = shared.setdefault(getattr(observer, "key", type(observer)), Readings(observer.read))

        def observe_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if x.numel() == 0:
                return
            try:
                observer.add(readings.of(x))
            except ValueError as error:
                raise NumbersError(
                    f"layer {name}: input with {error}. Check the calibration calls and their dtype."
                ) from error

        return observe_input

    with hooked(model, {name: hook_for(name, observer) for name, observer in observers.items()}):
        yield


def observe(
    model: nn.Module, observers: Mapping[str, InputObserver], calls: Iterable[Call], ranks: Ranks = ALONE
) -> int:
    """Runs the float `model` on those of the `calls` that `ranks` gives to this process, with `observers` by layer
    name; returns how many calls there were in all.

    Raises MisfitError for calls that do not fit the model, and without any call; NumbersError for an input that is not
    finite, with layer and call; DeviceError when memory runs out.
    """
    check_caches(model)
    count = 0
    with evaluating(model), observing(model, observers):
        for count, call in enumerate(calls, 1):
            if ranks.owns(count - 1):
                run(model, call, count - 1)
    if count == 0:
        raise MisfitError("calls: there are none to replay. Give some.")
    return count


def layers_called(model: nn.Module, names: Iterable[str], calls: Iterable[Call], ranks: Ranks = ALONE) -> set[str]:
    """The named layers that the float `model` calls when it runs `calls`; it stops when each of them was called.

    The others never run, or a function reads their weight: they must stay as they are. Collective: `ranks` share the
    calls.
    """
    wanted, called = set(names), set[str]()

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: called.add(name)

    with hooked(model, {name: hook_for(name) for name in wanted}), evaluating(model):
        for position, call in enumerate(calls):
            if wanted <= called:
                break
            if ranks.owns(position):
                run(model, call, position)
    return set().union(*ranks.gather(called))
