"""Inspects a file of torch.save before it is loaded: unpickles it, with a stand-in in place of every class and function
that the pickle names. A stand-in calls nothing and allocates nothing.

A file passes if every class or function that its pickle names is in a short list (NAMES), and if every tensor fits the
bytes in the file. A file that passes is loaded by torch.load with `weights_only=True`. This mode only reads pickles of
protocol 2, so torch.load reads pickles of another protocol with `DataUnpickler` instead.
"""

import codecs
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar, NamedTuple

import torch

from ..errors import FileError, OctavoError

PICKLE_LIMIT = 64 << 20  # bytes; the largest pickle inside a zip archive that is read
VIEW_LIMIT = 1 << 30  # bytes; a tensor with repeated (expanded) values may claim this much even in a smaller file
# torch.serialization.MAGIC_NUMBER: the first pickle in a file that torch.save wrote before torch 1.6
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
NOT_LOADED = "It was not loaded. Save it again with torch.save."


class StorageClaim(NamedTuple):
    """Describes a torch storage that the pickle refers to: key in the file, number of elements, bytes per element."""

    key: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


class TensorClaim(NamedTuple):
    """Stands for a tensor while a pickle is inspected; `bytes` is the size that the pickle claims."""

    bytes: int


class NotAllowed(Exception):
    """Raised when a pickle needs something that plain data never need, such as a class or function that is not in
    NAMES."""


@dataclass
class Claims:
    """Compares the bytes that the storages and tensors of a pickle claim with `size`, the bytes of the file at `path`.

    `storages` maps the key of each claimed storage to the claim; `protocols` has the pickle protocols of the file.
    """

    path: Path
    size: int
    storages: dict[str, StorageClaim] = field(default_factory=dict)
    protocols: set[int] = field(default_factory=set)  # pickle protocols of the inspected pickles

    def too_large(self, claimed: int) -> OctavoError:
        """Makes the FileError for tensors that claim `claimed` bytes, more than the file can hold."""
        return FileError(f"{self.path}: tensor of {human(claimed)} in a {human(self.size)} file. {NOT_LOADED}")

    def storage(self, identity: tuple[Any, ...]) -> StorageClaim:
        """Checks and returns a storage. `identity` is its id in torch.save: ("storage", type, key, device, elements).

        Raises FileError if the storage claims more bytes than the file has, ValueError for an id of another form.
        """
        kind, storage_type, key, _, elements = identity[:5]
        if kind != "storage" or type(elements) is not int or elements < 0:
            raise ValueError("it refers to something other than the storage of a tensor")
        storage = StorageClaim(str(key), elements, ITEMSIZES[storage_type])
        if storage.bytes > self.size:
            raise self.too_large(storage.bytes)
        return self.storages.setdefault(storage.key, storage)

    def tensor(
        self, storage: StorageClaim, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> TensorClaim:
        """Checks that a tensor lies inside its storage. The unpickler calls this method in place of
        torch._utils._rebuild_tensor_v2.

        `offset` and `stride` count elements. Raises FileError if the tensor does not lie inside, ValueError for a
        shape, offset or stride that no tensor can have.
        """
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a tensor of impossible shape")
        claimed = prod(shape) * storage.itemsize
        last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
        if claimed and (claimed > max(VIEW_LIMIT, self.size) or last >= max(storage.elements, 1)):
            raise self.too_large(claimed)
        return TensorClaim(claimed)

    def tensor_v3(
        self, storage: StorageClaim, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, *rest: Any
    ) -> TensorClaim:
        """Checks a tensor with another dtype than its storage. The unpickler calls this method in place of
        torch._utils._rebuild_tensor_v3.

        `rest` begins with the dtype of the tensor; `grad` and `hooks` are ignored. Raises FileError if the tensor does
        not lie inside its storage, ValueError for a shape, offset or stride that no tensor can have.
        """
        return self.tensor(storage._replace(elements=storage.bytes // rest[0].itemsize), offset, shape, stride)


def human(size: int) -> str:
    """Formats a size in bytes with its unit, such as 3.6 TiB."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} bytes"


# bytes of one element of each type of storage, by its name in torch
ITEMSIZES = {
    f"{kind}Storage": dtype.itemsize
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}


# the names that the pickle of a data file may need besides storages and dtypes, and their objects
NAMES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "_codecs.encode": codecs.encode,
    "builtins.complex": complex,
    "builtins.set": set,
}


class DataUnpickler(pickle._Unpickler):
    """Unpickles data of any pickle protocol.

    Raises NotAllowed if the pickle names a class or function that is neither in NAMES nor a storage type or dtype of
    torch, or if it sets attributes of an object that is not an OrderedDict. Derives from the unpickler written in
    Python, because a file can make the unpickler written in C allocate any amount of memory for its memo, the table of
    objects so far.
    """

    stack: list[Any]  # as the base class keeps it
    proto: int
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        owner, _, last = full.rpartition(".")
        if full in NAMES:
            return self.named(full)
        if owner in ("torch", "torch.storage") and last in ITEMSIZES:
            return self.storage(last)
        if owner == "torch" and isinstance(getattr(torch, last, None), torch.dtype):
            return getattr(torch, last)
        raise NotAllowed(full)

    def named(self, full: str) -> Any:
        """Returns the class or function for `full`, a name in NAMES."""
        return NAMES[full]

    def storage(self, kind: str) -> Any:
        """Returns torch's class for the storage type `kind`, such as FloatStorage."""
        return getattr(torch, kind)

    def get_extension(self, code: int) -> None:
        raise NotAllowed(f"copyreg extension {code}")

    def load_build(self) -> None:
        state, owner = self.stack.pop(), self.stack[-1]
        if type(owner) is not OrderedDict or type(state) is not dict:
            raise NotAllowed(
                f"to set attributes of an object of class {getattr(type(owner), '__qualname__', 'object')}"
            )
        vars(owner).update(state)

    def load_bytearray8(self) -> None:
        raise NotAllowed("builtins.bytearray")

    def load_next_buffer(self) -> None:
        raise NotAllowed("buffers outside the file")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.NEXT_BUFFER[0]] = dispatch[pickle.READONLY_BUFFER[0]] = load_next_buffer


class Bounded:
    """Wraps `file` so that `read(count)` raises EOFError if `count` is more than `size` bytes.

    Without this limit an unpickler may allocate as much memory as the pickle requests, before it reads.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise EOFError
        return self._file.read(count)


# the argument `pickle_module` that makes torch.load use DataUnpickler
DATA_PICKLE = SimpleNamespace(
    __name__="pickle of data",
    Unpickler=DataUnpickler,
    load=lambda file, **options: DataUnpickler(file).load(),
)


class DryUnpickler(DataUnpickler):
    """Unpickles a file to stand-ins that call and allocate nothing. Records in `claims` what the file claims to hold:
    its tensors, storages and pickle protocol.

    `size` is the most bytes that one read may request.
    """

    def __init__(self, file: IO[bytes], claims: Claims, size: int) -> None:
        super().__init__(Bounded(file, size))
        self._claims = claims
        self._stand_ins: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": claims.tensor,
            "torch._utils._rebuild_tensor_v3": claims.tensor_v3,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": tuple,
            "torch.device": lambda *_: None,
            "_codecs.encode": lambda *_: b"",
            "builtins.complex": lambda *_: 0j,
        }

    def load(self) -> Any:
        loaded = super().load()
        self._claims.protocols.add(self.proto)
        return loaded

    def named(self, full: str) -> Any:
        return self._stand_ins.get(full, NAMES[full])

    def storage(self, kind: str) -> Any:
        return kind

    def persistent_load(self, pid: Any) -> StorageClaim:
        if isinstance(pid, str):
            fact = "has pickle protocol 0, in which torch.save writes no tensors"
            raise FileError(
                f"{self._claims.path}: {fact}. Save it again with torch.save and its default pickle_protocol."
            )
        return self._claims.storage(pid)


def inspect_zip(file: IO[bytes], claims: Claims) -> None:
    """Inspects a zip archive of torch.save, without loading it; adds its storages and pickle protocol to `claims`.

    Raises NotAllowed if the archive names a class or function that is not in NAMES, FileError if it claims more memory
    than it has bytes or is another kind of zip archive. If the archive is damaged, zipfile and pickle may raise errors
    of any class.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        inflated = sum(info.file_size for info in entries.values())
        if inflated > claims.size:
            raise claims.too_large(inflated)
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in entries):
            raise foreign(claims.path, "a TorchScript program")
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise foreign(claims.path, "some other zip archive")
        if entries[pickles[0]].file_size > PICKLE_LIMIT:
            raise FileError(f"{claims.path}: pickle larger than {human(PICKLE_LIMIT)}. {NOT_LOADED}")
        with archive.open(pickles[0]) as stream:
            DryUnpickler(stream, claims, entries[pickles[0]].file_size).load()
    folder = pickles[0].removesuffix("data.pkl")
    for storage in claims.storages.values():
        entry = entries.get(f"{folder}data/{storage.key}")
        if entry is None or entry.file_size < storage.bytes:
            raise ValueError(f"storage {storage.key} is missing or short")


def inspect_legacy(file: IO[bytes], claims: Claims) -> None:
    """Inspects a file in the format of torch.save before torch 1.6, a sequence of pickles, without loading it.

    Adds the file's storages and pickle protocols to `claims`. Raises NotAllowed if the file names a class or function
    that is not in NAMES, FileError if the file claims more memory than it has bytes or is a plain pickle. If the file
    is damaged, pickle may raise errors of any class.
    """
    if DryUnpickler(file, claims, claims.size).load() != LEGACY_MAGIC:
        raise foreign(claims.path, "a plain pickle")
    for _ in ("protocol", "system", "object", "storage keys"):
        DryUnpickler(file, claims, claims.size).load()
    total = sum(storage.bytes for storage in claims.storages.values())
    if total > claims.size:
        raise claims.too_large(total)


def foreign(path: Path, what: str) -> OctavoError:
    """Makes the FileError for a file that torch.save did not write; `what` says what the file looks like."""
    return FileError(f"{path}: not a file of torch.save (looks like {what}). {NOT_LOADED}")


def looks_like(head: bytes) -> str:
    """Guesses the format of an unreadable file from its first bytes, `head`."""
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return "a truncated or damaged one"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a plain or damaged pickle"
    if head[257:262] == b"ustar":
        return "a tar archive"
    try:
        text = head.decode("utf-8", "strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        return "unknown data"
    odd = sum(not (character.isprintable() or character.isspace()) for character in text)
    return "text" if odd == 0 and len(text) > len(head) // 4 else "unknown data"
