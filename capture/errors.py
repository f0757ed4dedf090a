"""The errors that Octavo raises, each with the exit code of a command that ends with it.

    OctavoError          1  a run that could not do all it was asked for
    ├── UsageError       2  an option, argument or setting that has no meaning
    ├── FileError        3  a file that is missing, damaged, unsafe or of another format
    ├── MisfitError      4  a capture, checkpoint and model that do not belong together
    ├── StorageError     5  a disk or directory that cannot be written
    ├── NumbersError     6  values that are not finite, or that no scheme can hold
    └── DeviceError      7  a device, memory, or another process of the run that is missing

A message is one line: where, what is wrong, what to do.
"""

import errno
import os
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the file system lacks an operation


class OctavoError(Exception):
    """The root of all errors that Octavo raises on purpose: catching OctavoError catches every one."""

    exit_code = 1


class UsageError(OctavoError):
    """An option, argument or setting that has no meaning."""

    exit_code = 2


class FileError(OctavoError):
    """A file that is missing, damaged, unsafe or of another format."""

    exit_code = 3


class Unstorable(FileError):
    """An input of a call that a capture cannot hold: `fact` says which and why, `name` is the argument's, None for a
    positional one."""

    def __init__(self, owner: str, path: str, fact: str) -> None:
        root = path.split(".")[0].split("[")[0].split(" ")[0]
        self.name = None if root == "args" else root
        self.fact = f"{owner} '{path}': {fact}".lstrip()
        super().__init__(f"{self.fact}. Make it plain tensors, numbers or texts, or leave it out.")


class MisfitError(OctavoError):
    """A capture, checkpoint and model that do not belong together."""

    exit_code = 4


class StorageError(OctavoError):
    """A disk or directory that cannot be written."""

    exit_code = 5


class NumbersError(OctavoError):
    """Values that are not finite, or that no scheme can hold."""

    exit_code = 6


class DeviceError(OctavoError):
    """A device, memory, or another process of the run that is missing."""

    exit_code = 7


def error_with(exit_code: int, message: str) -> OctavoError:
    """The error of the class with this exit code; where no class has it, an OctavoError with that code."""
    for kind in OctavoError.__subclasses__():
        if kind.exit_code == exit_code:
            return kind(message)
    error = OctavoError(message)
    error.exit_code = exit_code
    return error


def damage(path: Path, fact: str, remedy: str = "") -> FileError:
    """The FileError for a file that is damaged or of another format."""
    return FileError(f"{path}: {fact}. {remedy}".rstrip())


def storage_error(path: Path, exc: OSError) -> StorageError:
    """The StorageError for an OSError, with a message that says what to do."""
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
    return StorageError(f"{path}: {fact}")


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's error, on one line and without its full stop."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
