"""Replay: the float model runs on the recorded calls while hooks pass the inputs of its layers to observers.

The hooks accept positional and keyword inputs with any number of axes. A layer may be called several times in a
forward, or with no rows (an expert without tokens). The hooks change nothing and are removed afterwards.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from octavo.capture.errors import MisfitError, NumbersError
from octavo.capture.ranks import ALONE, Ranks

from ..torch_state import computing, initial
from .calls import Call, check_caches, evaluating, run

_REMEMBERED = 4  # number of tensors whose readings are kept: to_q, to_k and to_v run one after the other
NO_HOOKS: Mapping[str, Callable[..., Any]] = MappingProxyType({})


class InputObserver(Protocol):
    """An object that observes the inputs of one layer, such as an observer (observers.py) or a survey."""

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """A function that takes a tensor and returns the statistics that the observer adds up, such as the extremes.
        The function raises ValueError for a tensor that is empty or has values that are not finite."""

    def add(self, reading: Any) -> None:
        """Adds `reading`, the statistics of one tensor, which the function `read` returned."""


class Readings:
    """Keeps what the function `read` of an observer returned for the last four tensors, so that a tensor that several
    layers receive one after another is read once."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        self._read = read
        self._known: list[tuple[weakref.ref[Tensor], int, Any]] = []

    def of(self, x: Tensor) -> Any:
        """Returns what `read` returns for `x`. If this object has read `x` already, and `x` has not changed since,
        returns the same result again without a call of `read`."""
        if x.is_inference():  # it has no version, so a change in place would go unnoticed
            return self._read(x)
        version = x._version
        for ref, read_version, reading in self._known:
            if ref() is x and read_version == version:
                return reading
        reading = self._read(x)
        self._known = [(weakref.ref(x), version, reading), *self._known[: _REMEMBERED - 1]]
        return reading


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the input of a linear or convolution from its positional or keyword arguments."""
    return args[0] if args else kwargs["input"]


@contextmanager
def hooked(
    model: nn.Module,
    before: Mapping[str, Callable[..., Any]] = NO_HOOKS,
    after: Mapping[str, Callable[..., Any]] = NO_HOOKS,
    *,
    always_call: bool = False,
) -> Iterator[None]:
    """Runs hooks before and after the forwards of modules, inside the `with` statement. `before` and `after` are dicts
    from module name to hook; "" is `model` itself.

    A hook is called with the module, its positional and its keyword arguments; a hook after the forward also with the
    output. A result other than None replaces the arguments or the output, as in torch. If `always_call` is True, the
    hooks in `after` also run when the forward raised an exception; the output is then None.
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
    """Returns a hook that calls `hook` with torch's default dtype and device set to float32 and CPU."""

    def settled(*args: Any) -> Any:
        if initial():
            return hook(*args)
        with computing():
            return hook(*args)

    return settled


@contextmanager
def axes(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, int]]:
    """Records the number of axes of the input of each layer in `names`, inside the `with` statement. Yields a dict from
    layer name to this number, which is 0 for a layer whose inputs differ in their number of axes."""
    counts: dict[str, int] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count = input_of(args, kwargs).ndim
            counts[name] = count if counts.get(name, count) == count else 0

        return record

    with hooked(model, {name: hook_for(name) for name in names}):
        yield counts


@contextmanager
def observing(model: nn.Module, observers: Mapping[str, InputObserver]) -> Iterator[None]:
    """Passes the inputs of layers of `model` to observers, inside the `with` statement. `observers` is a dict from
    layer name to observer.

    If several layers receive the same tensor, its statistics are read once for all observers that read the same
    statistics: those with an equal attribute `key`, and those without `key` if they have the same class. A forward
    inside the statement raises NumbersError for an input that is not finite.
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
                    f"layer {name}: its input is not finite ({error}). Check the data of the calls and their dtype."
                ) from error

        return observe_input

    with hooked(model, {name: hook_for(name, observer) for name, observer in observers.items()}):
        yield


def observe(
    model: nn.Module, observers: Mapping[str, InputObserver], calls: Iterable[Call], ranks: Ranks = ALONE
) -> int:
    """Runs the float `model` on the calls that belong to this rank, and passes the inputs of layers to `observers`, a
    dict from layer name to observer. Returns the number of calls of all ranks.

    Raises MisfitError for a call that does not fit the model, and if there are no calls; NumbersError for an input that
    is not finite, naming layer and call; DeviceError when memory runs out.
    """
    check_caches(model)
    count = 0
    with evaluating(model), observing(model, observers):
        for count, call in enumerate(calls, 1):
            if ranks.owns(count - 1):
                run(model, call, count - 1)
    if count == 0:
        raise MisfitError("calls: there are no calls to replay. Give at least one call.")
    return count


def layers_called(model: nn.Module, names: Iterable[str], calls: Iterable[Call], ranks: Ranks = ALONE) -> set[str]:
    """Runs the float `model` on `calls` until each of the layers `names` was called, and returns the names of the
    layers that were called.

    All other layers of `names` must stay float: either the model never uses the layer, or a function reads its weight
    without calling the layer. Collective: `ranks` share the calls, and all return the same.
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
