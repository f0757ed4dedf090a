"""Writes a graph: one file, and beside it `NAME.onnx.data` for tensors that do not fit into one protobuf."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.errors import StorageError
from octavo.capture.files import Modes, OutputFile, create, fsync_directory, staging, storage

from ..manifest import forget, manifest_for, write_manifest
from ..target import write_directory

if TYPE_CHECKING:
    from onnx import ModelProto

    from octavo.capture.fingerprint import Origin

LARGEST = (2 << 30) - (64 << 20)  # most bytes of tensors inside the graph's file: protobuf's 2 GiB, 64 MiB for nodes
DATA = ".data"
_ALIGNED = 4096  # bytes; external tensors begin at multiples of a page, since readers map pages
_SMALL = 1024  # bytes; tensors up to this size stay in the graph


def write_model(proto: "ModelProto", path: Path, mode: int, largest: int = LARGEST) -> None:
    """Writes `proto` to `path`, which must not exist. Tensors of more than `largest` bytes in all go to `path` +
    ".data", and `proto` loses them. The same graph gives the same bytes."""
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > largest:
        with create(path.with_name(path.name + DATA), mode) as sink:
            _move_tensors(proto, sink, path.name + DATA)
    with create(path, mode) as sink:
        sink.write(proto.SerializeToString(deterministic=True))


def _move_tensors(proto: "ModelProto", sink: OutputFile, location: str) -> None:
    from onnx import TensorProto

    at = 0
    for tensor in proto.graph.initializer:
        length = len(tensor.raw_data)
        if length <= _SMALL:
            continue
        at += sink.write(bytes(-at % _ALIGNED))
        for key, value in (("location", location), ("offset", at), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        at += sink.write(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL


def write_among(
    target: Path, fill: Callable[[Path], None], modes: Modes, name: str, origin: "Origin | None" = None
) -> None:
    """Puts the graphs that `fill` writes and their manifest into `target`, which is made if need be; other files stay.
    The manifest is named after `name` and names `origin` as the float model.

    Each graph is replaced in one step, never written into, and a symbolic link of its name is replaced itself. A graph
    with a data file is absent while the data are replaced: nothing can load a graph with the data of another. The
    manifest comes before the graphs: until the last of them is there, it does not fit.
    """
    manifest = manifest_for(name)

    def fill_all(staged: Path) -> None:
        fill(staged)
        write_manifest(staged, [path.name for path in staged.iterdir()], modes, origin, manifest)

    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: exists and is not a directory. Choose another name.")
    if not target.exists():
        write_directory(target, fill_all, modes)
        return
    with staging(target, target) as staged:
        fill_all(staged)
        with storage(target):
            forget(target, [path.name for path in staged.iterdir()])
            (staged / manifest).replace(target / manifest)
            for path in sorted(staged.glob("*.onnx")):
                _put(path, target / path.name)
        fsync_directory(target)


def _put(staged: Path, there: Path) -> None:
    data, old = (path.with_name(path.name + DATA) for path in (staged, there))
    if data.exists() or old.is_symlink() or old.exists():
        there.unlink(missing_ok=True)
        fsync_directory(there.parent)
    if data.exists():
        data.replace(old)
    else:
        old.unlink(missing_ok=True)
    staged.replace(there)
