"""Records the arguments of a module's calls with a forward pre-hook, while a `with` block runs."""

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .cache_context import CacheContextHook
from .call_arguments import bind, noise_level
from .errors import UsageError
from .relay import ArgumentSnapshot, callee_of
from .store.writer import Call
from .wrappers import inside


class Sink(Protocol):
    """An object that receives recorded calls, such as a `UnitWriter`. `add` must copy the tensors before it returns."""

    def add(self, call: Call) -> Any: ...


class Memory:
    """A sink that keeps copies of the calls in memory, in the order of recording, in the list `calls`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, call: Call) -> None:
        self.calls.append(call._replace(args=copied(call.args), kwargs=copied(call.kwargs)))


def copied(value: Any) -> Any:
    """Returns a copy of `value`, with its containers copied and its tensors cloned. In inference mode too, the clones
    are normal tensors, not inference tensors."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False), torch.no_grad():
            return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(map(copied, value))
    return value


def processors_of(module: nn.Module) -> dict[str, Any]:
    """Returns a dict from name to attention processor of a diffusers model; {} for other modules."""
    processors = getattr(inside(module), "attn_processors", None)
    return dict(processors) if isinstance(processors, dict) else {}


def _before_calls(module: nn.Module, hook: Callable[..., None]) -> Callable[[], None]:
    """Makes `hook` run before each call of `module`; returns a function that removes the hook.

    After `module.compile()` a forward pre-hook would be compiled into the graph. The function that calls the graph is
    then wrapped instead, so that the hook runs uncompiled.
    """
    graph = module._compiled_call_impl
    if graph is None:
        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def call(*args: Any, **kwargs: Any) -> Any:
        hook(module, args, kwargs)
        return graph(*args, **kwargs)

    module._compiled_call_impl = call
    return lambda: setattr(module, "_compiled_call_impl", graph)


def swapped(used: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """Counts the attention processors that a call replaces by others.

    `own` maps names to the processors of the module before the call, `used` to those during the call.
    """
    return sum(used.get(name) is not processor for name, processor in own.items())


def swap_warning(name: str, count: int) -> str:
    """Returns the warning that a pipeline replaces `count` attention processors of the denoiser `name`."""
    fact = f"the pipeline replaces {count} attention processors while it runs"
    return f"{name}: {fact}. A replay runs the original ones, so its layers get slightly different inputs."


class Clock:
    """Counts the denoising steps of a run, from 0; all recorders of the run's denoisers share one Clock.

    At first the step advances whenever a call has another noise level than the call before. After the first `tick`,
    with which the pipeline reports the end of a step (`callback_on_step_end`), only `tick` advances the step. The step
    never decreases, even where a pipeline restarts its own count, as for the next section of a video.
    """

    def __init__(self) -> None:
        self.step = 0
        self._level: float | None = None
        self._ticked = False

    def observe(self, level: float | None) -> int:
        """Returns the number of a call's denoising step. `level` is the noise level of the call, None if unknown."""
        if not self._ticked and level is not None:
            self.step += self._level is not None and level != self._level
            self._level = level
        return self.step

    def tick(self, done: int | None = None) -> None:
        """Advances the step by one. `done`, the number that the pipeline gives to the step, is ignored."""
        self.step += 1
        self._ticked = True


class Recorder:
    """Passes every call of `module` to `sink` while its `with` block runs; the module is unchanged afterwards.

    A recorded call has the denoiser's `name`, the index of the call in this recording, the denoising step as `clock`
    counts it, the noise level, and the cache context (diffusers' name for the call, such as "cond"). With guidance one
    step takes one, two or three calls. `keep(step)` returns whether the calls of a step are stored; `drop` has the
    names of arguments that are not stored. The `with` blocks of one recorder may be nested.

    Positional arguments are stored under the parameter names of the module's forward. If `module` is a wrapper, such as
    DataParallel, the names are those of the module inside it. If the forward takes *args and passes them unchanged to
    the only child module, the names of these arguments are those of the child; otherwise they stay positional.

    `call_count` is the number of calls so far, stored or not. `processors` maps names to the attention processors that
    the module had at the first call.
    """

    def __init__(
        self,
        module: nn.Module,
        sink: Sink,
        *,
        name: str = "transformer",
        clock: Clock | None = None,
        keep: Callable[[int], bool] = lambda step: True,
        drop: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.sink, self.name, self.clock = module, sink, name, clock or Clock()
        self.keep, self.drop = keep, drop
        self.call_count = 0
        self.processors: dict[str, Any] = {}
        self.seconds = 0.0  # time spent on recording
        self._callee = callee_of(module)
        self._pending: ArgumentSnapshot | None = None  # the running call, while its arguments have no names
        self._context_hook = CacheContextHook(inside(module))
        self._stack: ExitStack | None = None
        self._depth = 0
        self._own: dict[str, Any] = {}

    @property
    def swapped(self) -> int:
        """The number of the module's attention processors that were replaced between the start of the `with` block and
        the first call."""
        return swapped(self.processors, self._own) if self.call_count else 0

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._own = processors_of(self.module)
            with ExitStack() as stack:
                stack.enter_context(self._context_hook)
                stack.callback(_before_calls(self.module, self._before_call))
                if self._callee is not None:
                    stack.callback(self._callee.register_forward_pre_hook(self._before_callee, with_kwargs=True).remove)
                    stack.callback(self.module.register_forward_hook(self._after_call).remove)
                self._stack = stack.pop_all()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._stack is not None:
            self._stack.close()
            self._stack = None

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Serves as the forward pre-hook of `module`, the recorded module: records the call.

        If `module` passes positional arguments as *args to its only child module, only the child has names for these
        arguments. Then the call is recorded later, by the hook of the child.
        """
        try:
            rest, named = bind(inspect.signature(inside(self.module).forward), args, kwargs)
        except TypeError:
            return  # the call itself is about to fail, with a better message
        self._pending = ArgumentSnapshot.of(args, kwargs) if rest and self._callee is not None else None
        if self._pending is None:
            self._record(rest, named)

    def _before_callee(self, callee: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Serves as a forward pre-hook of `callee`, the child module to which the recorded module passes its *args:
        records the running call of the recorded module, with the argument names of `callee`. If `callee` gets other
        arguments than the recorded module, the call is recorded with positional arguments."""
        if self._pending is None or not self._pending.same_objects(args, kwargs):
            return self._after_call()
        try:
            rest, named = bind(inspect.signature(callee.forward), args, kwargs)
        except TypeError:
            return self._after_call()
        return self._record(rest, named)

    def _after_call(self, *_: Any) -> None:
        """Serves as a forward hook of the recorded module: records the running call with positional arguments, if it
        was not recorded before, as when the child module that has names for the arguments was not called."""
        if self._pending is not None:
            self._record(self._pending.args, self._pending.kwargs)

    def _record(self, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        began = time.perf_counter()
        if self._pending is not None and self._pending.changed:
            kind = type(inside(self.module)).__name__
            fact = f"{kind}.forward: takes *args and changes them in place before it passes them on"
            raise UsageError(f"{fact}. Record the wrapped module instead, or pass the arguments by name.")
        self._pending = None
        if self.call_count == 0:
            self.processors = processors_of(self.module)
        level = noise_level(named)
        step = self.clock.observe(level)
        if self.keep(step):
            named = {key: value for key, value in named.items() if key not in self.drop}
            self.sink.add(Call(self.name, self.call_count, step, level, self._context_hook.name, rest, named))
        self.call_count += 1
        self.seconds += time.perf_counter() - began
