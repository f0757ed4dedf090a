"""Checks the free space of a disk before a long run or a large file fills it."""

import errno
import os
import shutil
from pathlib import Path

from .errors import StorageError
from .progress import size


def existing_parent(target: Path) -> Path:
    """Returns the nearest existing directory above `target`; never `target` itself."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    return parent


def check_space(target: Path | str, needed: int, remedy: str = "Free space or use another directory") -> None:
    """Raises StorageError if the disk of `target`, which may not exist yet, has fewer free bytes than `needed`.

    The message ends with `remedy`, which says what the user can do. Does nothing if the file system does not report its
    free bytes.
    """
    path = Path(target).resolve()
    try:
        free = shutil.disk_usage(path if path.is_dir() else existing_parent(path)).free
    except OSError:
        return
    if free < needed:
        fact = f"needs about {size(needed)}, but only {size(free)} is free"
        raise StorageError(f"{target}: {fact}. {remedy}.") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
