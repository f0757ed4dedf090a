"""What this package refuses, and how it says so."""

import errno
import os
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class CaptureError(Exception):
    """A capture or file that cannot be used: one line naming where, what and the remedy."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def damage(path: Path, fact: str, remedy: str = "") -> CaptureError:
    """The error of a file that is not what was written."""
    return CaptureError(f"{path}: {fact}. {remedy}".rstrip(), 3)


def storage_error(path: Path, exc: OSError) -> CaptureError:
    """What an OSError means to the one who reads it."""
    facts = {
        errno.ENOSPC: "no space left. Free space and run again.",
        errno.EDQUOT: "disk quota exceeded. Free space and run again.",
        errno.EFBIG: "file too large for this file system or limit. Use another directory.",
        errno.EACCES: f"permission denied for uid {os.geteuid()}.",
        errno.EPERM: f"permission denied for uid {os.geteuid()}.",
        errno.EROFS: "read-only file system.",
        errno.ENAMETOOLONG: "name too long.",
        errno.ENOTDIR: "exists and is not a directory.",
        errno.ELOOP: "symbolic link. Give the real path.",
    }
    if exc.errno in UNSUPPORTED:
        fact = f"the file system lacks rename, lock or sync ({exc.strerror}). Use another directory."
    else:
        fact = facts.get(exc.errno or 0, f"{(exc.strerror or str(exc)).lower()}. Check the disk and run again.")
    return CaptureError(f"{path}: {fact}", 5)


class PipelineError(Exception):
    """A model directory, device or component that cannot be used: one line naming where, what and the remedy."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_sentence(error: BaseException) -> str:
    """What an error of a library says first, on one line and without its full stop."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
