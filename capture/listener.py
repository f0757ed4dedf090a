"""Records calibration data from Python: the module Listener wraps a denoiser and records the denoiser's calls."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from .errors import MisfitError, StorageError, UsageError
from .fingerprint import fingerprint
from .recorder import Memory, Recorder, Sink, processors_of, swap_warning, swapped
from .store.layout import CAPTURE, UNITS
from .store.writer import Call, CaptureWriter, UnitWriter
from .wrappers import inside

logger = logging.getLogger(__name__)
# attributes of the Listener itself; all others are those of the wrapped module
_OWN = frozenset({"module", "inputs", "swapped", "forward"})


@contextmanager
def _one_unit(directory: Path, module: nn.Module, name: str) -> Iterator[UnitWriter]:
    """Yields a UnitWriter, to which the `with` block adds calls. When the block ends, these calls become a capture in
    `directory`, as the calls of one prompt.

    `module` is the recorded denoiser, `name` its name in the capture. If the block raises an error, no capture is
    finished. Raises StorageError if `directory` already holds a capture, MisfitError if the block stored no call.
    """
    if (directory / CAPTURE).exists() and any((directory / UNITS).glob("[0-9]*-*")):
        raise StorageError(f"{directory}: already holds a capture. Give the Listener another directory.")
    manifest = {"pipeline": None, "components": {name: fingerprint(module)}, "prompts": 1, "settings": {}}
    with CaptureWriter.create(directory, manifest, resume=True) as writer:
        with writer.unit(0, {"prompt": None}) as unit:
            yield unit
            if unit.calls == 0:
                raise MisfitError(f"{directory}: the {name} was never called. Run it inside the with block.")
        writer.complete()


class _Inputs(Memory):
    """Keeps in memory the recorded calls of a Listener that has no `store`.

    `kind` is the class name of the recorded module, for messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def add(self, call: Call) -> None:
        if call.args:
            fact = f"{len(call.args)} positional arguments have no names, so the dicts in `inputs` cannot hold them"
            raise UsageError(f"{self._kind}.forward: {fact}. Pass them by name, or give the Listener a directory.")
        super().add(call)


class Listener(nn.Module):
    """Records the arguments of all calls of `module` while its `with` block runs, and does not change the module.

        with Listener(pipe.transformer, "CAPTURE"):
            pipe("an otter on a skateboard")

    `store` is the directory of a capture to write, an object whose method `add` receives each call (`UnitWriter`), or
    None. With None the calls stay in memory, and `inputs` lists them as dicts of keyword arguments; positional
    arguments get their names. `name` is the name of the denoiser in the capture.

    A Listener can also replace `module`, because it has all attributes of the module and records the calls that it
    receives: `pipe.transformer = Listener(pipe.transformer)`. Put `listener.module` back afterwards. With a
    directory a Listener only records inside its `with` block, because the capture is finished at the end of the block.

    A pipeline may replace attention processors of the module while it runs, as PAG does. `swapped` counts the
    processors that were replaced, and a warning is logged, because a replay runs the original processors.

    Raises UsageError for a call outside the block if there is a directory, and for arguments without names if calls
    stay in memory; MisfitError if a directory was given and no call was recorded; FileError for a value that cannot be
    stored; StorageError if the directory cannot be written or already holds a capture.
    """

    def __init__(self, module: nn.Module, store: str | Path | Sink | None = None, *, name: str = "transformer") -> None:
        state = (
            self.__dict__
        )  # written directly: nn.Module would register submodules, __setattr__ would write to `module`
        state["module"] = module
        super().__init__()
        directory = Path(store) if isinstance(store, (str, Path)) else None
        sink = _Inputs(type(inside(module)).__name__) if store is None or directory else store
        state["_directory"], state["_stacks"], state["_warned"] = directory, [], False
        state["_recorder"] = Recorder(module, sink, name=name)  # type: ignore[arg-type]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The calls kept in memory, each as a dict of keyword arguments."""
        self._warn_swapped()
        sink = self._recorder.sink
        return [call.kwargs for call in sink.calls] if isinstance(sink, Memory) else []

    @property
    def swapped(self) -> int:
        """The number of the module's attention processors that the pipeline had replaced by others when it first called
        the module."""
        return swapped(self._recorder.processors, processors_of(self.module)) if self._recorder.call_count else 0

    def _warn_swapped(self) -> None:
        if self.swapped and not self._warned:
            self.__dict__["_warned"] = True
            logger.warning(swap_warning(self._recorder.name, self.swapped))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._directory is not None and not self._stacks:
            fact = "is only written inside a with block"
            raise UsageError(
                f"{self._directory}: {fact}. Write `with listener:` around the run, and then put listener.module back."
            )
        with self._recorder:
            return self.module(*args, **kwargs)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._directory is not None:
                if self._stacks:
                    raise UsageError(
                        f"{self._directory}: the with block of this Listener is already running. Enter it once."
                    )
                name = self._recorder.name
                unit = stack.enter_context(_one_unit(self._directory, self.module, name))
                self.__dict__["_recorder"] = Recorder(self.module, unit, name=name)
            stack.enter_context(self._recorder)
            self._stacks.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stacks.pop().__exit__(kind, error, trace)
        self._warn_swapped()

    # Every public attribute that is not in _OWN is read from and written to the module.

    def __getattribute__(self, name: str) -> Any:
        state = super().__getattribute__("__dict__")
        if name in _OWN or (name.startswith("_") and name not in ("__class__", "__module__")):
            return super().__getattribute__(name)
        return getattr(state["module"], name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_recorder" in self.__dict__:
            setattr(self.__dict__["module"], name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["module"], name)
