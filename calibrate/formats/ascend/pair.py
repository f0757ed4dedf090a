"""Writes the weight file and the description of an ascend checkpoint into a directory that may hold other files."""

from collections.abc import Callable
from pathlib import Path

from octavo.capture.errors import StorageError, UsageError
from octavo.capture.files import Modes, fsync_directory, staging, storage
from octavo.capture.fingerprint import Origin

from ..manifest import manifest_for, remove_manifests, write_manifest
from ..target import write_directory


def write_pair(
    target: Path, names: tuple[str, str], fill: Callable[[Path], None], modes: Modes, origin: Origin | None = None
) -> None:
    """Writes the weight file and the description of a checkpoint, and a manifest of both, into the directory `target`.
    Files with other names stay.

    `names` are the names of the weight file and the description. `fill` is called with a staging directory, into which
    it writes these two files. The manifest records `origin`, the fingerprint of the float model; `modes` has the
    permissions of the files. If `target` has no other files, the whole directory is replaced at once. Otherwise the old
    description is removed first, and the new one is moved into `target` last. So a process that is interrupted never
    leaves a description with the wrong weights.

    Raises UsageError unless the names end in .safetensors and .json, StorageError if `target` is not a directory or
    cannot be written.
    """
    for name, ending in zip(names, (".safetensors", ".json"), strict=True):
        if Path(name).name != name or not name.endswith(ending):
            raise UsageError(f"{name!r} is not a file name that ends in {ending}. Give a name such as model{ending}.")
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
            remove_manifests(target, names)
            fsync_directory(target)
            for name in (names[0], manifest, names[1]):
                (staged / name).replace(target / name)
        fsync_directory(target)
