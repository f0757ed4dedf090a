"""The documented way to gather calibration data: a module that stands in for another and records its calls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from .errors import MisfitError
from .fingerprint import fingerprint
from .recorder import Memory, Recorder, Sink
from .store.writer import CaptureWriter, UnitWriter

_OWN = frozenset({"module", "inputs", "forward"})


@contextmanager
def _one_unit(directory: Path, module: nn.Module, name: str) -> Iterator[UnitWriter]:
    """Makes a finished capture of one unit when the block ends well, and no unit otherwise."""
    manifest = {"pipeline": None, "components": {name: fingerprint(module)}, "prompts": 1, "settings": {}}
    with CaptureWriter.create(directory, manifest) as writer:
        with writer.unit(0, {"prompt": None}) as unit:
            yield unit
            if unit.calls == 0:
                raise MisfitError(f"{directory}: the {name} was never called. Run it inside the block.")
        writer.complete()


class Listener(nn.Module):
    """Records the inputs of `module` while the `with` block runs; the module is unchanged afterwards.

        with Listener(pipe.transformer, "CAPTURE"):
            pipe("an otter on a skateboard")

    `store` is a directory to make, a sink (`UnitWriter`), or None: then the calls stay in memory and `inputs` lists
    them as dicts of keyword arguments, positional ones under their names.

    As a module, a Listener stands in for `module`, has all its attributes, and records its own calls, so that the
    documented form works: `pipe.transformer = Listener(pipe.transformer)`. Put `listener.module` back when done.

    Raises MisfitError when a block that fills a directory recorded no call; FileError for a value that cannot be
    stored; StorageError when the directory cannot be written.
    """

    def __init__(self, module: nn.Module, store: str | Path | Sink | None = None, *, name: str = "transformer") -> None:
        state = self.__dict__  # plain entries: none becomes a submodule, none reaches `module` by accident
        state["module"] = module
        super().__init__()
        directory = Path(store) if isinstance(store, (str, Path)) else None
        sink = Memory() if store is None or directory else store
        state["_directory"], state["_stack"] = directory, None
        state["_recorder"] = Recorder(module, sink, name=name)  # type: ignore[arg-type]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The calls kept in memory, each as a dict of keyword arguments."""
        sink = self._recorder.sink
        return [call.kwargs for call in sink.calls] if isinstance(sink, Memory) else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._recorder:
            return self.module(*args, **kwargs)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._directory is not None:
                self._recorder.sink = stack.enter_context(_one_unit(self._directory, self.module, self._recorder.name))
            stack.enter_context(self._recorder)
            self.__dict__["_stack"] = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = self.__dict__["_stack"]
        stack.__exit__(kind, error, trace)

    # Every attribute outside _OWN is read from and written to the module.

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
