"""Checks the target directory of a checkpoint before calibration starts, and replaces it as a whole at the end."""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.errors import StorageError
from octavo.capture.files import STAGING, Modes, make_directory, replace_directory, staging
from octavo.capture.space import existing_parent

from . import TABLE, format_named
from .manifest import MANIFEST

if TYPE_CHECKING:
    from torch import nn

_COMMON = rf"report\.(json|html)|{re.escape(MANIFEST)}|{STAGING.pattern}"


def is_export_name(name: str) -> bool:
    """Returns whether `name` is the name of a file or folder that an export writes."""
    patterns = [_COMMON, *(format_named(word).files for word in TABLE), *map(re.escape, TABLE)]
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_target(directory: Path | str, *, overwrite: bool = False) -> Path:
    """Checks that a checkpoint can be written to `directory`, and returns the absolute path of the directory with all
    symbolic links resolved. Leaves no change on disk.

    Raises StorageError for any obstacle: a file of that name; files in the directory that are not a checkpoint's; an
    earlier checkpoint, unless `overwrite` is True; no permission; a read-only file system; a name that is too long.
    """
    directory = Path(directory)
    try:
        target = directory.resolve()
        exists, is_directory = target.exists(), target.is_dir()
    except (OSError, RuntimeError) as error:
        text = "name too long" if "too long" in str(error) else str(error)
        raise StorageError(f"{directory}: {text}. Choose another directory.") from error
    if exists and not is_directory:
        raise StorageError(f"{directory}: exists and is not a directory. Choose another name.")
    if exists:
        _check_content(directory, target, overwrite)
    with staging(existing_parent(target)):
        pass
    return target


def _check_content(shown: Path, target: Path, overwrite: bool) -> None:
    try:
        names = sorted(path.name for path in target.iterdir())
    except PermissionError as error:
        raise StorageError(f"{shown}: permission denied. Choose another directory.") from error
    foreign = [name for name in names if not is_export_name(name) and not _is_checkpoint(target / name)]
    if foreign:
        fact = f"holds files that do not belong to a checkpoint ({foreign[0]})"
        raise StorageError(f"{shown}: {fact}. Choose another directory.")
    if names and not overwrite:
        raise StorageError(f"{shown}: holds a checkpoint. Use --overwrite or another directory.")


def _is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder holds an export and nothing else: a file report.json, and only files and folders with
    names that an export writes."""
    return (folder / "report.json").is_file() and all(is_export_name(path.name) for path in folder.iterdir())


def least_size(model: "nn.Module", integers: Collection[str], formats: int = 1) -> int:
    """Returns a lower bound for the bytes of a checkpoint of `model`. `integers` are the names of its integer layers,
    and `formats` is the number of formats that are written.

    The bound is `formats` times the bytes of all tensors: one byte for each number in the weight of an integer layer,
    and for other tensors their bytes in `model`.
    """
    from torch import Tensor  # whoever has a model has torch

    weights = {f"{name}.weight" for name in integers}
    tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    sizes = (x.numel() if name in weights else x.nbytes for name, x in tensors.values() if isinstance(x, Tensor))
    return formats * sum(sizes)


def write_directory(target: Path, fill: Callable[[Path], None], modes: Modes) -> None:
    """Calls `fill` with the path of a new, empty staging directory beside `target`, then replaces `target`, if it
    exists, by the staging directory in one step. `modes` are the permissions of new directories."""
    if not target.parent.exists():
        make_directory(target.parent, modes.directory)
    with staging(target.parent, target) as staged:
        fill(staged)
        replace_directory(staged, target, modes.directory)
