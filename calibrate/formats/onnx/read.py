"""Reads an ONNX graph from an untrusted source: opens no file outside its directory, and checks every number.

A file with external data must lie beside the graph. It is refused if its path leads elsewhere, if it is a symbolic
link, or if it has a second name (hard link). The offset and the length of a tensor must lie inside the file, and the
length must be the tensor's size.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from octavo.capture.errors import damage
from octavo.capture.sealed import digest_of, open_regular, read_bytes

from .ascend_operators import ascend_operators

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

_LIMIT = (2 << 30) - 1  # bytes; the largest message that protobuf can hold
_REMEDY = "Export the graph again."


class Graph(NamedTuple):
    """A graph read from the file at `path`: the SHA-256 `digest` and the `size` in bytes of that file, and `external`,
    the number of bytes of the graph's tensors that are in other files."""

    path: Path
    proto: "ModelProto"
    digest: str
    size: int
    external: int

    def array(self, tensor: "TensorProto") -> np.ndarray[Any, Any]:
        """Returns the values of `tensor`, one of the graph's tensors, read from its external file if it has one."""
        from onnx import numpy_helper

        return numpy_helper.to_array(tensor, str(self.path.parent))


def read_graph(path: Path) -> Graph:
    """Reads the graph at `path`, which may itself be a symbolic link.

    Raises FileError, naming the file, if the file is not a valid graph, needs a newer onnx than is installed, or has
    external data that must not be read, such as data in another directory.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(os.path.realpath(path))
    data = read_bytes(path, _LIMIT, _REMEDY)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise damage(path, "truncated, or not ONNX", _REMEDY) from error
    if not proto.graph.node:
        raise damage(path, "empty: the graph has no nodes", _REMEDY)
    _check_versions(path, proto)
    external = sum(_checked(path, tensor) for tensor in _external(proto))
    try:
        with ascend_operators():
            onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise damage(path, f"not a valid ONNX graph ({str(error).strip().splitlines()[0]})", _REMEDY) from error
    return Graph(path, proto, digest_of(data), len(data), external)


def _check_versions(path: Path, proto: "ModelProto") -> None:
    import onnx

    remedy = "Upgrade onnx, or export for an older version."
    if proto.ir_version > onnx.IR_VERSION:
        fact = f"ir_version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest that onnx {onnx.__version__}"
        raise damage(path, f"{fact} knows", remedy)
    newest = onnx.defs.onnx_opset_version()
    version = opset_of(proto)
    if version is None:
        raise damage(path, "names no opset", _REMEDY)
    if version > newest:
        fact = f"opset {version} is newer than {newest}, the newest that onnx {onnx.__version__} knows"
        raise damage(path, fact, remedy)


def opset_of(proto: "ModelProto") -> int | None:
    """Returns the version of the standard ONNX operators (the opset of the default domain) that the graph uses; None if
    the graph names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)


def _tensors(message: Any) -> Iterator["TensorProto"]:
    """Yields every tensor anywhere in a protobuf message: in graphs, branches, attributes, functions."""
    from onnx import TensorProto

    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                if isinstance(part, TensorProto):
                    yield part
                else:
                    yield from _tensors(part)


def _external(proto: "ModelProto") -> Iterator["TensorProto"]:
    from onnx import TensorProto

    tensors = _tensors(proto)
    return (tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)


def _checked(path: Path, tensor: "TensorProto") -> int:
    """Returns the number of bytes of `tensor`, a tensor of the graph at `path` whose data are in another file. Raises
    FileError for data that must not be read, such as a file in another directory."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not location or location in (".", "..") or "/" in location or "\\" in location or "\0" in location:
        raise damage(
            path,
            f"tensor {tensor.name} has its data outside the graph's directory, in {location!r}",
            "Do not use the graph.",
        )
    file = path.parent / location
    if file.is_symlink():
        raise damage(
            file,
            f"is a symbolic link, but the data of {path.name} have to be in a regular file",
            "Do not use the graph.",
        )
    with open_regular(file, f"{path.name} needs it. {_REMEDY}") as (descriptor, size):
        if os.fstat(descriptor).st_nlink > 1:
            fact = f"is a hard link, so the data of {path.name} have other file names too"
            raise damage(file, fact, "Copy the file in its place.")
    offset, length = _number(file, tensor.name, entries.get("offset", "0")), _length(tensor, file)
    if _number(file, tensor.name, entries.get("length", str(length))) != length:
        raise damage(
            file, f"tensor {tensor.name} has {entries['length']} bytes in this file, but needs {length}", _REMEDY
        )
    if offset + length > size:
        fact = f"{tensor.name} ends at byte {offset + length}, but the file has {size} bytes"
        raise damage(file, fact, _REMEDY)
    return length


def _number(file: Path, name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise damage(file, f"'{text[:40]}' is not a valid offset or length of the tensor {name}", _REMEDY)
    return int(text)


def _length(tensor: "TensorProto", file: Path) -> int:
    from onnx import helper

    try:
        itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise damage(file, f"{tensor.name} has an unknown type ({tensor.data_type})", _REMEDY) from error
    if any(length < 0 for length in tensor.dims):
        raise damage(file, f"{tensor.name} has shape {tuple(tensor.dims)}", _REMEDY)
    return math.prod(tensor.dims) * itemsize
