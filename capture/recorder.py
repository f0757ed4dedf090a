"""Records the arguments of a module's calls, through a forward pre-hook, while a `with` block runs."""

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .cache_context import ContextEar
from .call_arguments import bind, noise_level
from .errors import UsageError
from .relay import Passed, callee_of
from .store.writer import Call
from .wrappers import inside


class Sink(Protocol):
    """A destination of calls: a `UnitWriter`, or any object whose `add` copies the tensors before returning."""

    def add(self, call: Call) -> Any: ...


class Memory:
    """A sink that keeps `calls` in order, their tensors cloned and their containers rebuilt."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, call: Call) -> None:
        self.calls.append(call._replace(args=copied(call.args), kwargs=copied(call.kwargs)))


def copied(value: Any) -> Any:
    """Copies `value`: clones every tensor (outside inference mode) and rebuilds every container."""
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
    """The attention processors inside a diffusers model, by name; {} for other modules."""
    found = getattr(inside(module), "attn_processors", None)
    return dict(found) if isinstance(found, dict) else {}


def _before_calls(module: nn.Module, hook: Callable[..., None]) -> Callable[[], None]:
    """Has `hook` run before each call of `module`; returns a function that undoes it.

    After `module.compile()` a forward hook would become part of the graph: the hook then runs before the graph does.
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
    """The number of attention processors that are `used` in place of the module's `own`."""
    return sum(used.get(name) is not processor for name, processor in own.items())


def swap_warning(name: str, count: int) -> str:
    """The warning that a pipeline swaps `count` attention processors of the denoiser `name` while it runs."""
    return f"{name}: the pipeline swaps {count} attention processors while it runs; a replay does not."


class Clock:
    """The denoising step of a run, shared by the recorders of its denoisers.

    The step advances when the noise level of a call differs from the last one, until the first `tick`: the pipeline's
    own report that a step is done (`callback_on_step_end`). From then on only `tick` advances the step. It never goes
    back, also where a pipeline begins to count anew, as one for the next section of a video does.
    """

    def __init__(self) -> None:
        self.step = 0
        self._level: float | None = None
        self._told = False

    def hear(self, level: float | None) -> int:
        if not self._told and level is not None:
            self.step += self._level is not None and level != self._level
            self._level = level
        return self.step

    def tick(self, done: int | None = None) -> None:
        """Advances the step; the pipeline's own number of the step, `done`, does not matter."""
        self.step += 1
        self._told = True


class Recorder:
    """Passes every call of `module` to `sink` while the `with` block runs; the module is unchanged afterwards.

    A call carries the component's name, its index in this recording, the denoising step, the noise level and the
    cache context. Calls are not steps: with guidance a step takes one, two or three calls. `keep(step)` says which
    steps are stored; `drop` names arguments to leave out. The block may be entered again inside itself.

    Positional arguments get their names from the module inside a wrapper. Where a module takes *args, and passes them
    on to the only module inside it, the names are those of that module; where it does not, they stay positional.

    `heard` counts the calls. `processors` are the attention processors of the first call; `swapped` counts those that
    ran in place of the module's own: a replay runs the module's own.
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
        self.heard = 0
        self.processors: dict[str, Any] = {}
        self.seconds = 0.0  # time spent in recording
        self._callee = callee_of(module)
        self._passed: Passed | None = None  # a call whose arguments have no names yet
        self._ear = ContextEar(inside(module))
        self._stack: ExitStack | None = None
        self._depth = 0
        self._own: dict[str, Any] = {}

    @property
    def swapped(self) -> int:
        """The number of attention processors of the first call that were not there before the block."""
        return swapped(self.processors, self._own) if self.heard else 0

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._own = processors_of(self.module)
            with ExitStack() as stack:
                stack.enter_context(self._ear)
                stack.callback(_before_calls(self.module, self._hear))
                if self._callee is not None:
                    stack.callback(self._callee.register_forward_pre_hook(self._hear_inside, with_kwargs=True).remove)
                    stack.callback(self.module.register_forward_hook(self._end).remove)
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

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records a call, as a pre-hook of the module."""
        try:
            rest, named = bind(inspect.signature(inside(self.module).forward), args, kwargs)
        except TypeError:
            return  # the call itself is about to fail, with a better message
        self._passed = Passed.of(args, kwargs) if rest and self._callee is not None else None
        if self._passed is None:
            self._record(rest, named)

    def _hear_inside(self, callee: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records the call that is running, as a pre-hook of `callee`: with its names, where it is the same call."""
        if self._passed is None or not self._passed.same(args, kwargs):
            return self._end()
        try:
            rest, named = bind(inspect.signature(callee.forward), args, kwargs)
        except TypeError:
            return self._end()
        return self._record(rest, named)

    def _end(self, *_: Any) -> None:
        """Records the call that is running as it is, if it is not recorded yet."""
        if self._passed is not None:
            self._record(self._passed.args, self._passed.kwargs)

    def _record(self, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        began = time.perf_counter()
        if self._passed is not None and self._passed.changed:
            kind = type(inside(self.module)).__name__
            fact = f"{kind}.forward: changes its arguments in place before it passes them on"
            raise UsageError(f"{fact}, and takes *args. Record the module inside, or pass arguments by name.")
        self._passed = None
        if self.heard == 0:
            self.processors = processors_of(self.module)
        level = noise_level(named)
        step = self.clock.hear(level)
        if self.keep(step):
            named = {key: value for key, value in named.items() if key not in self.drop}
            self.sink.add(Call(self.name, self.heard, step, level, self._ear.name, rest, named))
        self.heard += 1
        self.seconds += time.perf_counter() - began
