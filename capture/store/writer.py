"""Writes a capture to disk.

CAPTURE/capture.json                 sealed JSON: the version of the layout, and the manifest; written first
CAPTURE/units/000007-KEY/            the calls of one prompt; appears only when complete
    data-000.safetensors             blobs, named by the hash of their content; at most 256 MiB
    unit.json                        sealed JSON: the data files, blobs, tensors and calls
CAPTURE/complete.json                sealed JSON: the units and the digests of their unit.json; missing until finished

The manifest of a capture says how the calls were recorded, such as the model, the dtype and the settings. 000007 is the
number of the unit, and KEY is a digest of what determines its calls, such as prompt, seed and steps (`unit_key`). A
blob is a tensor, or a row of one; equal blobs of a unit are stored once. Sealed JSON holds its own SHA-256, so that
every damage is found.
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
    """Writes a capture: `create` it, fill one `unit` after the other, then `complete` and `close` it.

    Only one run can write to the directory at a time; each rank of that run has a writer of its own.

    with CaptureWriter.create("capture", {"pipeline": "...", "steps": 28, "prompts": 50}) as writer:
        with writer.unit(0, {"prompt": "an otter", "seed": 0}) as unit:
            unit.add(call)
        writer.complete()

    `stored` maps the index of each unit that this process knows to be stored to the key of the unit, a digest of what
    determines its calls, such as prompt and seed.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], modes: Modes, directory_lock: Lock | None) -> None:
        self.directory = directory
        self.manifest = manifest
        self.stored: dict[int, str] = {}
        self.stored_bytes = 0
        self._modes, self._lock = modes, directory_lock
        self._remedy = "run again"

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
        """Locks `directory` for writing a capture with this manifest, and makes the directory if it does not exist.

        A unit is the stored calls of one prompt; `manifest["prompts"]` is how many are planned. With `resume`, an
        existing capture is continued; its manifest must equal `manifest` except for top-level keys that begin with
        "prompt". An existing capture without units is started again, whatever its manifest. `resume` is None if the
        caller has no option to continue a capture; messages then do not suggest --resume. `group_readable` lets the
        user's group read the files. If `directory` is a symbolic link, its target is used from then on.

        Raises MisfitError if the manifests differ, StorageError if the directory cannot be written or is in use,
        FileError if an existing capture is damaged.

        Every one of `ranks`, the processes of the capture, has to call `create`: rank 0 locks the directory and removes
        half-written units before the others go on.
        """
        path, modes = Path(os.path.realpath(directory)), Modes(group_readable)
        if ranks.rank:
            return cls._joined(path, manifest, modes, ranks)
        prepare(path, modes, resume)
        directory_lock = lock(path)
        try:
            writer = cls(path, manifest, modes, directory_lock)
            writer._remedy += "" if resume is None else " with --resume"
            writer._start(resume)
            ranks.first(writer.stored)
        except BaseException:
            directory_lock.release()
            raise
        return writer

    @classmethod
    def _joined(cls, path: Path, manifest: dict[str, Any], modes: Modes, ranks: Ranks) -> Self:
        """Makes the writer of a rank other than 0, after rank 0 has made the capture.

        Raises StorageError if this rank does not see the capture, MisfitError if the capture has another manifest.
        `modes` has the permissions of new files.
        """
        writer = cls(path, manifest, modes, None)
        writer.stored = ranks.first(writer.stored)
        if not (path / CAPTURE).exists():
            fact = f"rank 0 created the capture, but rank {ranks.rank} does not see it"
            raise StorageError(f"{path}: {fact}. Use a directory that all machines share.")
        check_same(path, read_capture(path), manifest)
        return writer

    def _start(self, resume: bool | None) -> None:
        """Writes the manifest, or compares it with that of an existing capture; reads which units are stored.

        `resume` is whether the user wants to continue an existing capture. Raises StorageError if a capture with stored
        units exists and `resume` is not True; MisfitError if the manifests differ.
        """
        clean(self.directory)
        prepare(self.directory, self._modes, resume)  # again: only under the lock can no other process change it
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
        """Yields a writer for the calls of one prompt; stores them if the `with` block ends without an error.

        `info` is a JSON object with everything that determines the calls: prompt, negative prompt, seed, size, steps.
        Raises MisfitError if the unit `index` is stored already, or if the block added no call.
        """
        key = unit_key(info)
        if index in self.stored:
            raise MisfitError(f"{self.directory}: unit {index} is already stored. Choose another index.")
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
        """Returns the error to raise instead of `exc`. If `exc` reports a full disk, this is a StorageError that says
        how many prompts are stored and about how much space the other prompts need; otherwise it is `exc` itself.

        `writer` is the writer of the current unit, None if no unit is being written.
        """
        if not (isinstance(exc.__cause__, OSError) and exc.__cause__.errno in NO_SPACE):
            return exc
        stored = len(self.unit_names())
        planned = max(int(self.manifest.get("prompts") or 0), stored + 1)
        unit = writer.stored_bytes if writer else 0
        if self.stored:
            unit = max(unit, self.stored_bytes // len(self.stored))
        needs = max(1, -(-unit * (planned - stored) >> 20))
        return StorageError(
            f"{self.directory}: no space left (needs about {needs} MiB more). {stored} of {planned} prompts "
            f"are stored; free space and {self._remedy}.",
        )

    def unit_names(self) -> dict[int, str]:
        """Returns a dict from index to directory name of all stored units, including those that other ranks stored."""
        return list_units(self.directory)

    def complete(self) -> None:
        """Finishes the capture: writes complete.json, a list of the stored units and the digests of their unit.json."""
        names = list_units(self.directory)
        units = {name: read_unit(self.directory, name)[0].digest for name in names.values()}
        try:
            write_sealed(self.directory / COMPLETE, {"units": units}, self._modes.manifest)
        except OctavoError as exc:
            raise self._with_count(exc, None) from exc.__cause__

    def close(self) -> None:
        """Releases the directory for other processes."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
