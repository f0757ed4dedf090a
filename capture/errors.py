"""The errors that Octavo raises, each with the exit code of a command that ends with it.

    OctavoError          1  the run could not do everything that was requested
    ├── UsageError       2  an option, argument or setting is invalid
    ├── FileError        3  a file is missing, damaged, unsafe or of another format
    ├── MisfitError      4  a capture, a checkpoint and a model do not belong together
    ├── StorageError     5  a disk or directory cannot be written
    ├── NumbersError     6  values are not finite, or no scheme can represent them
    └── DeviceError      7  a device, memory, or another process of the run is missing

A message is one line that says where, what is wrong, and what to do.
"""

import errno
import os
from pathlib import Path

# errors of the operating system that mean: the disk or the user's quota is full
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# errors of the operating system that mean: the file system does not offer the operation
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class OctavoError(Exception):
    """The base class of all errors that Octavo raises on purpose."""

    exit_code = 1


class UsageError(OctavoError):
    """Reports an invalid option, argument or setting."""

    exit_code = 2


class FileError(OctavoError):
    """Reports a file that is missing, damaged, unsafe or of another format."""

    exit_code = 3


class Unstorable(FileError):
    """Reports an argument of a call that a capture cannot store.

    Parameters: `owner` and `path` say where the value is, such as "transformer input" and "added_cond_kwargs.time_ids";
    `fact` says why it cannot be stored. Attributes: `fact` is the text "OWNER 'PATH': FACT", made of these parameters;
    `name` is the name of the call's argument, None if it is positional.
    """

    def __init__(self, owner: str, path: str, fact: str) -> None:
        root = path.split(".")[0].split("[")[0].split(" ")[0]
        self.name = None if root == "args" else root
        self.fact = f"{owner} '{path}': {fact}".lstrip()
        super().__init__(f"{self.fact}. Pass tensors, numbers or text instead, or leave it out.")


class MisfitError(OctavoError):
    """Reports that a capture, a checkpoint and a model do not belong together."""

    exit_code = 4


class StorageError(OctavoError):
    """Reports a disk or directory that cannot be written."""

    exit_code = 5


class NumbersError(OctavoError):
    """Reports values that are not finite, or that no scheme can represent."""

    exit_code = 6


class DeviceError(OctavoError):
    """Reports that a device, memory, or another process of the run is missing."""

    exit_code = 7


def error_with(exit_code: int, message: str) -> OctavoError:
    """Makes an error with this `message`, of the class that has this exit code. If no class has the exit code, the
    error is an OctavoError with this exit code."""
    for kind in OctavoError.__subclasses__():
        if kind.exit_code == exit_code:
            return kind(message)
    error = OctavoError(message)
    error.exit_code = exit_code
    return error


def damage(path: Path, fact: str, remedy: str = "") -> FileError:
    """Makes the FileError for a damaged file at `path`: `fact` says what is wrong, `remedy` what the user can do."""
    return FileError(f"{path}: {fact}. {remedy}".rstrip())


def storage_error(path: Path, exc: OSError) -> StorageError:
    """Makes the StorageError for `exc`, an OSError about `path`, with a message that says what to do."""
    facts = {
        errno.ENOSPC: "no space left. Free space and run again.",
        errno.EDQUOT: "disk quota exceeded. Free space and run again.",
        errno.EFBIG: "file too large for this file system or limit. Use another directory.",
        errno.EACCES: f"permission denied for uid {os.geteuid()}. Change its permissions or use another path.",
        errno.EPERM: f"permission denied for uid {os.geteuid()}. Change its permissions or use another path.",
        errno.EROFS: "read-only file system. Use another directory.",
        errno.ENAMETOOLONG: "name too long. Use a shorter one.",
        errno.ENOTDIR: "exists and is not a directory. Use another path.",
        errno.ELOOP: "is a symbolic link. Give the real path.",
    }
    if exc.errno in UNSUPPORTED:
        fact = f"the file system lacks rename, lock or sync ({exc.strerror}). Use another directory."
    else:
        fact = facts.get(exc.errno or 0, f"{(exc.strerror or str(exc)).lower()}. Check the disk and run again.")
    return StorageError(f"{path}: {fact}")


def first_sentence(error: BaseException) -> str:
    """Returns the first sentence of the message of a library's error, on one line and without its full stop."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
