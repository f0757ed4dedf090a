"""Writes a capture to disk.

CAPTURE/capture.json                 sealed: the schema and the manifest; written first
CAPTURE/units/000007-KEY/            the calls of one prompt: whole, or absent
    data-000.safetensors             blobs under their content keys, parts of at most 256 MiB
    unit.json                        sealed: parts, blobs, tensors, calls
CAPTURE/complete.json                sealed: the units and the digests of their unit.json; absent = not finished
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import NO_SPACE, MisfitError, OctavoError, StorageError
from ..files import Modes, clean, commit_directory, make_directory, remove, staging, write_sealed
from ..locks import Lock, lock
from ..ranks import ALONE, Ranks
from ..sealed import canonical
from .directory import check_same, count_units, prepare
from .layout import CAPTURE, COMPLETE, SCHEMA, UNITS, Call, list_units, read_capture, read_unit, unit_key
from .unit import UnitWriter

__all__ = ["Call", "CaptureWriter", "UnitWriter", "unit_key"]


class CaptureWriter:
    """A capture being written: `create` one, fill `unit`s, then `complete` and `close` it. One writer holds the
    directory, but ranks of one run share it.

    with CaptureWriter.create("capture", {"pipeline": "...", "steps": 28, "prompts": 50}) as writer:
        with writer.unit(0, {"prompt": "an otter", "seed": 0}) as unit:
            unit.add(call)
        writer.complete()

    `stored` maps the indices of the stored units to their keys (see unit_key).
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], modes: Modes, held: Lock | None) -> None:
        self.directory = directory
        self.manifest = manifest
        self.stored: dict[int, str] = {}
        self.stored_bytes = 0
        self._modes, self._held = modes, held
        self._again = "run again"

    @classmethod
    def create(
        cls,
        directory: str | Path,
        manifest: dict[str, Any],
        *,
        resume: bool | None = None,
        group_readable: bool = False,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Locks `directory` (made when absent) for a capture with this manifest.

        `manifest["prompts"]` is the number of planned units. With `resume`, an existing capture is continued: its
        manifest must equal this one except for top-level keys that begin with "prompt". A symbolic link is resolved
        once, to `self.directory`. A capture without units is begun again, whatever its manifest. None for `resume` says
        that the caller has no way to continue a capture.

        Raises MisfitError when the manifests differ, StorageError when the directory cannot be written or is in use,
        FileError when an existing capture is damaged.

        Collective: of several `ranks` the first holds the lock, and cleans the directory before the others begin.
        """
        path, modes = Path(os.path.realpath(directory)), Modes(group_readable)
        if ranks.rank:
            return cls._joined(path, manifest, modes, ranks)
        prepare(path, modes, resume)
        held = lock(path)
        try:
            writer = cls(path, manifest, modes, held)
            writer._again += "" if resume is None else " with --resume"
            writer._start(resume)
            ranks.first(writer.stored)
        except BaseException:
            held.release()
            raise
        return writer

    @classmethod
    def _joined(cls, path: Path, manifest: dict[str, Any], modes: Modes, ranks: Ranks) -> Self:
        """The writer of another rank than the first, once that has made the capture."""
        writer = cls(path, manifest, modes, None)
        writer.stored = ranks.first(writer.stored)
        if not (path / CAPTURE).exists():
            fact = "rank 0 has made a capture, which is not to be seen from here"
            raise StorageError(f"{path}: {fact}. Use a directory that all machines share.")
        check_same(path, read_capture(path), manifest)
        return writer

    def _start(self, resume: bool | None) -> None:
        clean(self.directory)
        prepare(self.directory, self._modes, resume)  # again: under the lock no other process changes the directory
        body = {"schema": SCHEMA, "manifest": self.manifest}
        canonical(body)
        path = self.directory / CAPTURE
        if path.exists():
            stored = read_capture(self.directory)
            if count_units(self.directory):
                check_same(self.directory, stored, self.manifest)
            if canonical(stored) != canonical(self.manifest):
                write_sealed(path, body, self._modes.manifest)
        else:
            write_sealed(path, body, self._modes.manifest)
        units = self.directory / UNITS
        if not units.exists():
            make_directory(units, self._modes.directory)
        clean(units)
        for index, name in list_units(self.directory).items():
            unit, _ = read_unit(self.directory, name)
            self.stored[index] = unit.key
            self.stored_bytes += unit.stored_bytes

    @contextmanager
    def unit(self, index: int, info: dict[str, Any]) -> Iterator[UnitWriter]:
        """Opens a unit to fill: committed when the block ends well, dropped without a trace after an error.

        `info` has everything the unit depends on (prompt, negative prompt, seed, size, steps, ...), as JSON.
        """
        key = unit_key(info)
        if index in self.stored:
            raise MisfitError(f"{self.directory}: unit {index} is stored already. Choose another index.")
        remove(self.directory / COMPLETE)
        target = self.directory / UNITS / f"{index:06d}-{key}"
        writer: UnitWriter | None = None
        try:
            with staging(self.directory / UNITS, self.directory) as staged:
                writer = UnitWriter(staged, self._modes, index, key, info)
                yield writer
                writer.finish()
                commit_directory(staged, target, self._modes.directory)
        except OctavoError as exc:
            raise self._with_count(exc, writer) from exc.__cause__
        finally:
            if target.exists():
                self.stored[index] = key
        self.stored_bytes += writer.stored_bytes

    def _with_count(self, exc: OctavoError, writer: UnitWriter | None) -> OctavoError:
        """Adds to an error of a full disk how much is stored and how much is missing; returns other errors as is."""
        if not (isinstance(exc.__cause__, OSError) and exc.__cause__.errno in NO_SPACE):
            return exc
        stored = len(self.there())
        planned = max(int(self.manifest.get("prompts") or 0), stored + 1)
        unit = writer.stored_bytes if writer else 0
        if self.stored:
            unit = max(unit, self.stored_bytes // len(self.stored))
        needs = max(1, -(-unit * (planned - stored) >> 20))
        return StorageError(
            f"{self.directory}: no space left (needs about {needs} MiB more). {stored} of {planned} prompts "
            f"are stored; free space and {self._again}.",
        )

    def there(self) -> dict[int, str]:
        """The names of all stored units by index, whichever rank stored them."""
        return list_units(self.directory)

    def complete(self) -> None:
        """Marks the capture as finished: lists the units and their digests."""
        names = list_units(self.directory)
        units = {name: read_unit(self.directory, name)[0].digest for name in names.values()}
        try:
            write_sealed(self.directory / COMPLETE, {"units": units}, self._modes.manifest)
        except OctavoError as exc:
            raise self._with_count(exc, None) from exc.__cause__

    def close(self) -> None:
        """Releases the directory for other processes."""
        if self._held is not None:
            self._held.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.close()
