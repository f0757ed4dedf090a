"""Free space on a disk, looked at before a long run or a large file fills it."""

import errno
import os
import shutil
from pathlib import Path

from .errors import StorageError
from .progress import size


def existing_parent(target: Path) -> Path:
    """The nearest existing directory above `target`."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    return parent


def check_space(target: Path | str, needed: int, remedy: str = "Free space or use another directory") -> None:
    """Raises StorageError where the disk of `target`, which may not exist yet, has fewer free bytes than `needed`."""
    place = Path(target).resolve()
    try:
        free = shutil.disk_usage(place if place.is_dir() else existing_parent(place)).free
    except OSError:
        return  # the file system does not say
    if free < needed:
        fact = f"needs about {size(needed)}, and {size(free)} is free"
        raise StorageError(f"{target}: {fact}. {remedy}.") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
