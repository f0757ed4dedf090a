"""Writes ONNX graphs to files: `NAME.onnx`, and `NAME.onnx.data` beside it for tensors too large for one protobuf."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.errors import StorageError
from octavo.capture.files import Modes, OutputFile, create, fsync_directory, staging, storage

from ..manifest import manifest_for, remove_manifests, write_manifest
from ..target import write_directory

if TYPE_CHECKING:
    from onnx import ModelProto

    from octavo.capture.fingerprint import Origin

# bytes of tensors that the graph's own file may hold: protobuf's limit of 2 GiB, less 64 MiB for the nodes
LARGEST = (2 << 30) - (64 << 20)
DATA = ".data"  # appended to the graph's file name for the file with its large tensors
_ALIGNED = 4096  # bytes; each external tensor begins at a multiple of the page size, so that readers can map it
_SMALL = 1024  # bytes; tensors up to this size stay in the graph's own file


def write_model(proto: "ModelProto", path: Path, mode: int, largest: int = LARGEST) -> None:
    """Writes the graph `proto` to `path`, which must not exist, with the permissions `mode`. The same graph gives the
    same bytes.

    If the tensors of the graph have more than `largest` bytes together, each tensor above 1 KiB is written to `path` +
    ".data" and removed from `proto`.
    """
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > largest:
        with create(path.with_name(path.name + DATA), mode) as sink:
            _move_tensors(proto, sink, path.name + DATA)
    with create(path, mode) as sink:
        sink.write(proto.SerializeToString(deterministic=True))


def _move_tensors(proto: "ModelProto", sink: OutputFile, location: str) -> None:
    from onnx import TensorProto

    offset = 0
    for tensor in proto.graph.initializer:
        length = len(tensor.raw_data)
        if length <= _SMALL:
            continue
        offset += sink.write(bytes(-offset % _ALIGNED))
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += sink.write(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL


def write_graphs(
    target: Path, fill: Callable[[Path], None], modes: Modes, name: str, origin: "Origin | None" = None
) -> None:
    """Writes graphs, and a manifest of them, into the directory `target`. `fill` is called with a staging directory,
    into which it writes the graphs. `modes` has the permissions of new files.

    `target` is created if it does not exist. Files with other names stay. `name` becomes part of the manifest's file
    name, and the manifest records `origin`, the fingerprint of the float model.

    Each graph is replaced in one step, never overwritten in place; a symbolic link of its name is replaced too, not
    followed. If a graph has a data file, the old graph is removed before the data file is replaced, so no graph can be
    loaded with the data of another. The manifest is replaced before the graphs, so an interrupted write leaves a
    manifest that does not match.

    Raises StorageError if `target` exists and is not a directory, or cannot be written.
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
            remove_manifests(target, [path.name for path in staged.iterdir()])
            (staged / manifest).replace(target / manifest)
            for path in sorted(staged.glob("*.onnx")):
                _put(path, target / path.name)
        fsync_directory(target)


def _put(staged: Path, target: Path) -> None:
    """Moves a graph from the path `staged` to the path `target`, and its data file, if it has one, to `target` +
    ".data". Removes an older data file of that name."""
    data, old = (path.with_name(path.name + DATA) for path in (staged, target))
    if data.exists() or old.is_symlink() or old.exists():
        target.unlink(missing_ok=True)
        fsync_directory(target.parent)
    if data.exists():
        data.replace(old)
    else:
        old.unlink(missing_ok=True)
    staged.replace(target)
