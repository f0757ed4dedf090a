"""Writes a checkpoint's two files into a user's directory, which may hold other files."""

from collections.abc import Callable
from pathlib import Path

from octavo.capture.errors import StorageError, UsageError
from octavo.capture.files import Modes, fsync_directory, staging, storage

from ..target import write_directory


def write_pair(target: Path, names: tuple[str, str], fill: Callable[[Path], None], modes: Modes) -> None:
    """Puts weights and description, which `fill` writes under these names, into `target`; other files stay.

    Where `target` has no other files, the directory is replaced as a whole. Else the old description is removed first
    and the new one comes last: at every instant `target` has the old files, the new ones, or no description, without
    which nothing loads the weights.
    """
    for name, ending in zip(names, (".safetensors", ".json"), strict=True):
        if Path(name).name != name or not name.endswith(ending):
            raise UsageError(f"{name!r}: not a file name that ends in {ending}. Give one.")
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: exists and is not a directory. Choose another name.")
    with storage(target):
        others = {path.name for path in target.iterdir()} - set(names) if target.exists() else set()
    if not others:
        write_directory(target, fill, modes)
        return
    with staging(target) as staged:
        fill(staged)
        with storage(target):
            (target / names[1]).unlink(missing_ok=True)
            fsync_directory(target)
            for name in names:
                (staged / name).replace(target / name)
        fsync_directory(target)
