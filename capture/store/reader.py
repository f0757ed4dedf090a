"""Reads a capture, and checks all data against their digests before use. Imports torch only to read tensors."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ..errors import MisfitError, damage
from ..sealed import open_regular, read_sealed
from .headers import TORCH_NAMES, Stored
from .layout import COMPLETE, MALFORMED, UNITS, Call, CallHeader, Unit, list_units, read_capture, read_unit, remedy_for
from .parts import Part, matches, read_blob, read_header
from .stats import Stats, join_stats
from .tree import decode

if TYPE_CHECKING:
    import torch

__all__ = ["Call", "CallHeader", "Capture", "TensorInfo", "Unit"]


class TensorInfo(NamedTuple):
    """Describes a stored tensor without its values; `dtype` is torch's name, such as float16; `stats` is None for
    integers and booleans."""

    dtype: str
    shape: tuple[int, ...]
    stats: Stats | None  # for float tensors only


class Capture:
    """A capture on disk. `Capture.open(directory)` opens it; `calls()` yields its calls, any number of times.

    `directory` is its path, `manifest` the settings it was recorded with. A unit holds the calls of one prompt: `units`
    describes the stored units, and `planned` is the number of units that the finished capture has.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], units: list[Unit]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.units = units
        self.planned = manifest.get("prompts", len(units))

    @classmethod
    def open(cls, directory: str | Path, *, allow_incomplete: bool = False) -> Self:
        """Opens a capture: reads and checks its manifests, but no tensors.

        Raises FileError if a file is missing, is damaged or does not belong to the capture; MisfitError if the capture
        holds no calls. An unfinished capture raises MisfitError too, unless `allow_incomplete` is True.
        """
        path = Path(directory)
        manifest = read_capture(path)
        names = list_units(path)
        finished = path / COMPLETE
        if finished.exists() or finished.is_symlink():
            units = _listed(path, names)
        elif allow_incomplete:
            units = [read_unit(path, name)[0] for name in names.values()]
        else:
            raise MisfitError(
                f"{path}: capture not finished ({len(names)} of {manifest.get('prompts', '?')} prompts). "
                "Finish with capture --resume or pass --allow-incomplete.",
            )
        if not any(unit.calls for unit in units):
            raise MisfitError(f"{path}: holds no calls. Capture again.")
        return cls(path, manifest, units)

    def calls(
        self,
        component: str | None = None,
        *,
        units: Collection[int] | None = None,
        where: Callable[[CallHeader], bool] | None = None,
    ) -> Iterator[Call]:
        """Yields the calls in the order of recording.

        Only yields the calls of the denoiser `component`, of the prompts with the indices `units`, and with headers for
        which `where` returns True; None selects all. Holds one call in memory. The caller may change its tensors.
        """
        yield from (load() for _, load in self.later(component, units=units, where=where))

    def later(
        self,
        component: str | None = None,
        *,
        units: Collection[int] | None = None,
        where: Callable[[CallHeader], bool] | None = None,
    ) -> Iterator[tuple[CallHeader, Callable[[], Call]]]:
        """Yields the header of each selected call, with a function that reads the whole call.

        Selects the calls of the denoiser `component`, of the prompts with the indices `units`, and with headers for
        which `where` returns True; None selects all. Call the function before requesting the next header, while the
        data files of this prompt are still open.
        """
        for unit in self._chosen(units):
            with _opened(self.directory, unit) as source:
                yield from source.calls(component, where, source.tensor)

    def descriptions(
        self,
        component: str | None = None,
        *,
        units: Collection[int] | None = None,
        where: Callable[[CallHeader], bool] | None = None,
    ) -> Iterator[Call]:
        """Yields the selected calls with a description (TensorInfo) in place of each tensor, and reads no tensor data.

        Selects the calls of the denoiser `component`, of the prompts with the indices `units`, and with headers for
        which `where` returns True; None selects all.
        """
        for unit in self._chosen(units):
            with _opened(self.directory, unit) as source:
                yield from (load() for _, load in source.calls(component, where, source.describe))

    def verify(self) -> None:
        """Reads and checks every byte of the capture. Raises FileError for the first damaged file, naming it."""
        for unit in self.units:
            with _opened(self.directory, unit) as source:
                source.verify()
                for _, load in source.calls(None, None, source.describe):
                    load()

    def _chosen(self, units: Collection[int] | None) -> list[Unit]:
        return [unit for unit in self.units if units is None or unit.index in units]


def _listed(directory: Path, names: dict[int, str]) -> list[Unit]:
    """Reads the unit.json of each unit (the calls of one prompt) that complete.json lists.

    `names` maps the index of each unit that is stored in `directory` to the name of the unit's folder.
    Raises FileError unless exactly the listed units are stored, unchanged.
    """
    path = directory / COMPLETE
    remedy = f"Delete {path} and run capture --resume."
    try:
        digests = dict(read_sealed(path, remedy).body["units"])
    except MALFORMED as exc:
        raise damage(path, f"holds no list of the capture's units ({exc})", remedy) from exc
    for name in names.values():
        if name not in digests:
            raise damage(directory / UNITS / name, "not listed in complete.json", remedy_for(directory, name))
    units = []
    for name in sorted(digests):
        if name not in names.values():
            raise damage(directory / UNITS / name, "missing", "Run capture --resume.")
        unit, _ = read_unit(directory, name)
        if unit.digest != digests[name]:
            fact = "not the unit that complete.json lists (checksum)"
            raise damage(directory / UNITS / name, fact, remedy_for(directory, name))
        units.append(unit)
    return units


class _Source:
    """Reads the calls of one prompt from the open data files in `folder`. `body` is the content of unit.json.

    `remedy` ends the messages of errors. A tensor is stored as one or several blobs, byte strings with a hash as key.
    `checked` has the keys of the blobs whose bytes were compared with their key.
    """

    def __init__(self, folder: Path, remedy: str, body: dict[str, Any]) -> None:
        self.folder, self.remedy, self.body = folder, remedy, body
        self.paths = [folder / part["file"] for part in body["parts"]]
        self.descriptors: list[int] = []
        self.blobs: list[dict[str, Stored]] = []
        self.checked: set[str] = set()

    def open(self, stack: ExitStack) -> None:
        for path, part in zip(self.paths, self.body["parts"], strict=True):
            descriptor, size = stack.enter_context(open_regular(path, self.remedy))
            self.blobs.append(read_header(descriptor, size, Part(**part), path, self.remedy))
            self.descriptors.append(descriptor)

    def calls(
        self, component: str | None, where: Callable[[CallHeader], bool] | None, get: Callable[[Any], Any]
    ) -> Iterator[tuple[CallHeader, Callable[[], Call]]]:
        """Yields the header of each selected call, with a function that reads and returns the whole call.

        Selects the calls of the denoiser `component` whose headers `where` accepts; None selects all. `get` turns the
        number of a tensor in unit.json into a tensor or a description.
        """
        for record in self.body["calls"]:
            header = CallHeader(*(record[name] for name in CallHeader._fields))
            header = header._replace(timestep=decode(header.timestep, get))
            if (component is not None and header.component != component) or (where and not where(header)):
                continue
            yield header, partial(self.call, header, record, get)

    def call(self, header: CallHeader, record: dict[str, Any], get: Callable[[Any], Any]) -> Call:
        """Returns the call with this `header`, and with its arguments decoded from `record`, the call's entry in
        unit.json.

        `get` turns the number of a tensor in unit.json into a tensor or a description. Raises FileError for a malformed
        entry.
        """
        try:
            if not isinstance(record["args"], list):
                raise TypeError("arguments that are not a list")
            args = tuple(decode(value, get) for value in record["args"])
            kwargs = {name: decode(value, get) for name, value in record["kwargs"]}
        except MALFORMED as exc:
            raise damage(self.folder / "unit.json", f"not a unit of a capture ({exc})", self.remedy) from exc
        return Call(*header, args, kwargs)

    def tensor(self, entry: int) -> "torch.Tensor":
        """Reads a tensor, given `entry`, its number in unit.json. Raises FileError if its bytes are damaged.

        Raises one of the errors in the tuple MALFORMED, such as KeyError, if unit.json describes the tensor wrongly.
        """
        import torch

        from .blobs import memory_of

        name, shape, keys, *order = self.body["tensors"][entry]
        places = [self._find(key) for key in keys]
        split = 0 if len(keys) == 1 else 1 if len(keys) == shape[0] else 2  # dimensions that rows do not have
        if any(blob.shape != tuple(shape[split:]) for _, blob in places) or math.prod(shape[:split]) != len(keys):
            raise ValueError("the data of a tensor do not fit the tensor's shape")
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[name]))
        rows = [tensor] if split == 0 else list(tensor.flatten(0, split - 1).unbind(0))
        for key, row, (part, blob) in zip(keys, rows, places, strict=True):
            if blob.dtype != TORCH_NAMES[name]:
                raise ValueError("a tensor has another dtype than in the data file")
            self._read(key, part, blob, memory_of(row))
        if not order:
            return tensor
        if sorted(order[0]) != list(range(len(shape))):
            raise ValueError("a tensor has an invalid order of dimensions")
        return torch.empty_permuted(shape, order[0], dtype=tensor.dtype).copy_(tensor)

    def describe(self, entry: int) -> TensorInfo:
        """Returns dtype, shape and Stats of a tensor, given `entry`, its number in unit.json; reads no values."""
        name, shape, keys, *_ = self.body["tensors"][entry]
        parts = [self.body["blobs"][key][1] for key in keys]
        stats = join_stats([Stats(*values) if values else None for values in parts])
        return TensorInfo(TORCH_NAMES[name], tuple(shape), stats)

    def verify(self) -> None:
        """Reads and checks the bytes of every tensor. Raises FileError for a damaged one."""
        for part, blobs in enumerate(self.blobs):
            for key, blob in blobs.items():
                self._read(key, part, blob, memoryview(bytearray(blob.bytes)))
        for key in self.body["blobs"]:
            self._find(key)

    def _find(self, key: str) -> tuple[int, Stored]:
        part = self.body["blobs"][key][0]
        return part, self.blobs[part][key]

    def _read(self, key: str, part: int, blob: Stored, into: memoryview) -> None:
        read_blob(self.descriptors[part], blob, into, self.paths[part], self.remedy)
        if key not in self.checked:
            if not matches(key, blob, into):
                raise damage(self.paths[part], "damaged (checksum)", self.remedy)
            self.checked.add(key)


@contextmanager
def _opened(directory: Path, unit: Unit) -> Iterator[_Source]:
    """Opens the data files of one prompt's calls while the `with` block runs; yields the _Source that reads them.

    Raises FileError if the unit.json of `unit` changed since the capture was opened.
    """
    remedy = remedy_for(directory, unit.name)
    again, body = read_unit(directory, unit.name)
    folder = directory / UNITS / unit.name
    if again.digest != unit.digest:
        raise damage(folder / "unit.json", "changed since the capture was opened", "Open the capture again.")
    source = _Source(folder, remedy, body)
    with ExitStack() as stack:
        source.open(stack)
        yield source
