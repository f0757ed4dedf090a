"""Runs `octavo inspect`: shows and checks a capture, a checkpoint or an ONNX graph."""

import sys
from pathlib import Path

from octavo.capture.errors import FileError, UsageError
from octavo.pipelines.files import model_directory

from ..terminal import Terminal
from .inspect_capture import inspect_capture
from .next_command import after_capture, after_inspect


def run(path: Path, terminal: Terminal) -> None:
    """Runs `octavo inspect` on `path`. Exits with code 3 if a checkpoint, an ONNX graph or a safetensors file at `path`
    is not sound, that is, incomplete or refused by a library that should load it.

    Raises UsageError if there is nothing at `path`. Raises FileError for damaged files, and if `path` is neither a
    capture nor a checkpoint nor a graph. Raises MisfitError for an unfinished capture.
    """
    path = model_directory(str(path))
    if (path / "capture.json").exists() or (path / "units").exists():
        inspect_capture(path, terminal)
        after_capture(path, terminal)
    elif path.is_dir() and (any(path.glob("*.json")) or any(path.glob("*.onnx")) or _checkpoints_in(path)):
        if not _inspect_directory(path, terminal):
            sys.exit(3)
        after_inspect(path, terminal)
    elif path.suffix == ".onnx" and path.exists():
        from .inspect_onnx import inspect_onnx

        if not inspect_onnx(path, terminal):
            sys.exit(3)
    elif path.suffix == ".safetensors" and path.is_file():
        from .inspect_file import inspect_file

        if not inspect_file(path, terminal):
            sys.exit(3)
        after_inspect(path, terminal)
    elif path.exists():
        raise FileError(f"{path}: is neither a capture nor a checkpoint. Give a directory that Octavo wrote.")
    else:
        raise UsageError(f"{path}: no such directory. Correct the path.")


def _checkpoints_in(path: Path) -> list[Path]:
    return [] if (path / "report.json").exists() else sorted(file.parent for file in path.glob("*/report.json"))


def _inspect_directory(path: Path, terminal: Terminal) -> bool:
    """Shows the checkpoints and ONNX graphs in the directory `path`, which may be a pipeline with quantized denoisers.
    Returns whether all of them are sound."""
    sound, graphs = True, sorted(path.glob("*.onnx"))
    if not graphs or any(path.glob("*.safetensors")):
        from octavo.calibrate.formats.inspect import quantized_parts

        from .inspect_checkpoint import inspect_checkpoint

        parts = quantized_parts(path) if (path / "model_index.json").exists() else _checkpoints_in(path) or [path]
        if not parts:
            raise FileError(f"{path}: is a pipeline without a quantized model. Give a checkpoint or a capture.")
        sound = all([inspect_checkpoint(part, terminal) for part in parts])
    else:
        from .inspect_checkpoint import verified

        verified(path, terminal)
    for graph in graphs:
        from .inspect_onnx import inspect_onnx

        sound = inspect_onnx(graph, terminal) and sound
    return sound
