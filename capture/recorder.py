"""Records the arguments of a module's calls, through a forward pre-hook, while a `with` block runs."""

import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .cache_context import ContextEar
from .call_arguments import bind, noise_level
from .store.writer import Call


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
    found = getattr(module, "attn_processors", None)
    return dict(found) if isinstance(found, dict) else {}


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

    `heard` counts the calls. `swapped` counts the attention processors with which the first call ran in place of the
    module's own: a replay runs the module's own.
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
        self.heard = self.swapped = 0
        self.seconds = 0.0  # time spent in recording
        self._signature = inspect.signature(module.forward)
        self._ear = ContextEar(module)
        self._stack: ExitStack | None = None
        self._depth = 0
        self._processors: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._processors = processors_of(self.module)
            with ExitStack() as stack:
                stack.enter_context(self._ear)
                stack.callback(self.module.register_forward_pre_hook(self._hear, with_kwargs=True).remove)
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
        began = time.perf_counter()
        try:
            rest, named = bind(self._signature, args, kwargs)
        except TypeError:
            return  # the call itself is about to fail, with a better message
        if self.heard == 0:
            now = processors_of(module)
            self.swapped = sum(now.get(name) is not own for name, own in self._processors.items())
        level = noise_level(named)
        step = self.clock.hear(level)
        if self.keep(step):
            named = {key: value for key, value in named.items() if key not in self.drop}
            self.sink.add(Call(self.name, self.heard, step, level, self._ear.name, rest, named))
        self.heard += 1
        self.seconds += time.perf_counter() - began
