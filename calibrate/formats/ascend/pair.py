"""Writes a checkpoint's two files into a user's directory, which may hold other files."""

from collections.abc import Callable
from pathlib import Path

from octavo.capture.errors import StorageError, UsageError
from octavo.capture.files import Modes, fsync_directory, staging, storage
from octavo.capture.fingerprint import Origin

from ..manifest import forget, manifest_for, write_manifest
from ..target import write_directory


def write_pair(
    target: Path, names: tuple[str, str], fill: Callable[[Path], None], modes: Modes, origin: Origin | None = None
) -> None:
    """Puts weights and description, which `fill` writes under these names, and their manifest into `target`; other
    files stay. The manifest names `origin` as the float model.

    Where `target` has no other files, the directory is replaced as a whole. Else the old description is removed first
    and the new one comes last, after the manifest: at every instant `target` has the old files, the new ones, or no
    description, without which nothing loads the weights.
    """
    for name, ending in zip(names, (".safetensors", ".json"), strict=True):
        if Path(name).name != name or not name.endswith(ending):
            raise UsageError(f"{name!r}: not a file name that ends in {ending}. Give one.")
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: exists and is not a directory. Choose another name.")
    with storage(target):
        others = {path.name for path in target.iterdir()} - set(names) if target.exists() else set()
    manifest = manifest_for(names[1].removesuffix(".json"))

    def fill_all(staged: Path) -> None:
        fill(staged)
        write_manifest(staged, names, modes, origin, manifest)

    if not others - {manifest}:
        write_directory(target, fill_all, modes)
        return
    with staging(target) as staged:
        fill_all(staged)
        with storage(target):
            (target / names[1]).unlink(missing_ok=True)
            forget(target, names)
            fsync_directory(target)
            for name in (names[0], manifest, names[1]):
                (staged / name).replace(target / name)
        fsync_directory(target)
