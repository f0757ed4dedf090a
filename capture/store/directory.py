"""Checks whether a directory can hold a capture to be written, or an interrupted capture to be continued."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MisfitError, StorageError
from ..files import STAGING, Modes, make_directory, storage
from ..locks import LOCK_NAME
from ..sealed import canonical
from .layout import CAPTURE, UNITS, list_units, read_capture


def prepare(directory: Path, modes: Modes, resume: bool | None) -> None:
    """Makes `directory`, with the permissions in `modes`, if it does not exist. Raises StorageError if a capture cannot
    be written there.

    The reason may be that `directory` is a file, that it holds files that are not part of a capture, or that it holds
    the calls of some prompts while `resume` is not True. In the last case the message suggests --resume unless `resume`
    is None.
    """
    with storage(directory):
        # the longest path that will be written: a name that is too long fails here, before any file is written
        with suppress(FileNotFoundError):
            (directory / UNITS / ("0" * 29) / "data-000.safetensors").lstat()
        if not os.path.lexists(directory):
            make_directory(directory, modes.directory)
        names = [entry.name for entry in directory.iterdir()]
    if CAPTURE not in names:
        foreign = sorted(name for name in names if name != LOCK_NAME and not STAGING.fullmatch(name))
        if foreign:
            raise StorageError(f"{directory}: not empty and not a capture (found {foreign[0]}). Use another directory.")
    elif not resume:
        planned = read_capture(directory).get("prompts", "?")
        if stored := count_units(directory):
            remedy = "Use another directory" if resume is None else "Use --resume or another directory"
            raise StorageError(f"{directory}: holds a capture ({stored} of {planned} prompts). {remedy}.")


def count_units(directory: Path) -> int:
    """Returns for how many prompts the capture in `directory` holds the calls; 0 if it was interrupted at its start."""
    return len(list_units(directory)) if os.path.lexists(directory / UNITS) else 0


def check_same(directory: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises MisfitError if the manifest `stored`, of the capture in `directory`, differs from `now`, the manifest of
    this run.

    The message names the first setting that differs. Top-level keys that begin with "prompt" may differ.
    """
    difference = _difference(_settings(stored), _settings(json.loads(canonical(now))), "")
    if difference is not None:
        name, before, after = difference
        raise MisfitError(
            f"{directory}: captured with {name} {before}, now {after}. Use the same settings or another directory."
        )


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if not name.startswith("prompt")}


def _difference(before: Any, after: Any, name: str) -> tuple[str, Any, Any] | None:
    """Returns the first entry in which the JSON values `before` and `after` differ: its dotted name and both values;
    None if they are equal.

    `name` is the dotted name of the two values themselves.
    """
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return None if canonical(before) == canonical(after) else (name, before, after)
    for key in [*before, *(key for key in after if key not in before)]:
        inner = _difference(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
        if inner is not None:
            return inner
    return None
