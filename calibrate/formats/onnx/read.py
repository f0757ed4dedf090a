"""Reads a graph from an untrusted source: nothing outside its directory is opened, every claim is checked.

External data have to be a file of their own beside the graph: a path that leads elsewhere, a symbolic link, a file with
other names (hard links), an extent outside the file or of another length than the tensor are refused.
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
_AGAIN = "Export it anew."


class Graph(NamedTuple):
    """A graph that was read: its file, its SHA-256, its `size`, and the bytes of tensors in `external` files."""

    path: Path
    proto: "ModelProto"
    digest: str
    size: int
    external: int

    def array(self, tensor: "TensorProto") -> np.ndarray[Any, Any]:
        """The values of one of the graph's tensors."""
        from onnx import numpy_helper

        return numpy_helper.to_array(tensor, str(self.path.parent))


def read_graph(path: Path) -> Graph:
    """Reads the graph at `path`, which may itself be a symbolic link.

    Raises FileError, naming the file, for a file that is no graph, is newer than the installed onnx, or whose external
    data are refused.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(os.path.realpath(path))
    data = read_bytes(path, _LIMIT, _AGAIN)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise damage(path, "truncated, or not ONNX", _AGAIN) from error
    if not proto.graph.node:
        raise damage(path, "empty: a graph without nodes", _AGAIN)
    _check_versions(path, proto)
    external = sum(_checked(path, tensor) for tensor in _external(proto))
    try:
        with ascend_operators():
            onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise damage(path, f"not a valid graph ({str(error).strip().splitlines()[0]})", _AGAIN) from error
    return Graph(path, proto, digest_of(data), len(data), external)


def _check_versions(path: Path, proto: "ModelProto") -> None:
    import onnx

    remedy = "Upgrade onnx, or export for an older version."
    if proto.ir_version > onnx.IR_VERSION:
        fact = f"ir_version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest that onnx {onnx.__version__}"
        raise damage(path, f"{fact} knows", remedy)
    known = onnx.defs.onnx_opset_version()
    version = opset_of(proto)
    if version is None:
        raise damage(path, "says no opset", _AGAIN)
    if version > known:
        fact = f"opset {version} is newer than {known}, the newest that onnx {onnx.__version__} knows"
        raise damage(path, fact, remedy)


def opset_of(proto: "ModelProto") -> int | None:
    """The opset of the default domain; None where the graph names none."""
    return next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), None)


def _tensors(message: Any) -> Iterator["TensorProto"]:
    """Yields every tensor anywhere in a message: in graphs, branches, attributes, functions."""
    from onnx import TensorProto

    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if isinstance(value, Sequence) else [value]:
                if isinstance(each, TensorProto):
                    yield each
                else:
                    yield from _tensors(each)


def _external(proto: "ModelProto") -> Iterator["TensorProto"]:
    from onnx import TensorProto

    return (each for each in _tensors(proto) if each.data_location == TensorProto.EXTERNAL or each.external_data)


def _checked(path: Path, tensor: "TensorProto") -> int:
    """The bytes of an external tensor. Raises FileError for data that must not be read."""
    entries = {each.key: each.value for each in tensor.external_data}
    location = entries.get("location", "")
    if not location or location in (".", "..") or "/" in location or "\\" in location or "\0" in location:
        raise damage(
            path, f"{tensor.name}: its data are outside the graph's directory ({location!r})", "Do not use it."
        )
    file = path.parent / location
    if file.is_symlink():
        raise damage(file, f"symbolic link in the place of the data of {path.name}", "Do not use it.")
    with open_regular(file, f"{path.name} needs it. {_AGAIN}") as (descriptor, size):
        if os.fstat(descriptor).st_nlink > 1:
            raise damage(file, f"hard link: it has other names than the one in {path.name}", "Copy it.")
    offset, length = _number(file, entries.get("offset", "0")), _length(tensor, file)
    if _number(file, entries.get("length", str(length))) != length:
        raise damage(file, f"{tensor.name} has {entries['length']} bytes there and wants {length}", _AGAIN)
    if offset + length > size:
        raise damage(file, f"{tensor.name} ends at byte {offset + length} of {size}", _AGAIN)
    return length


def _number(file: Path, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise damage(file, f"'{text[:40]}' is not an offset or a length", _AGAIN)
    return int(text)


def _length(tensor: "TensorProto", file: Path) -> int:
    from onnx import helper

    try:
        itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise damage(file, f"{tensor.name} is of no known type ({tensor.data_type})", _AGAIN) from error
    if any(length < 0 for length in tensor.dims):
        raise damage(file, f"{tensor.name} has shape {tuple(tensor.dims)}", _AGAIN)
    return math.prod(tensor.dims) * itemsize
