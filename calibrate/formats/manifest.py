"""Writes and verifies manifests. A manifest holds the SHA-256 and the size of each file of an export, the fingerprint
of the float model, and the version of Octavo.

A manifest lies beside the files. It also holds the SHA-256 of its own content, as the manifests of a capture do. Its
name is octavo*.manifest. No software that loads a checkpoint opens a file with such a name:

- MindIE-SD opens the description that it is given, and the weights named after it.
- SGLang opens the first file whose name begins with quant_model_description.
- diffusers opens config.json and diffusion_pytorch_model*.
- onnxruntime and Ascend's compiler open the graph, and the data files that the graph names.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.capture.errors import FileError, OctavoError, damage, storage_error
from octavo.capture.files import Modes, create
from octavo.capture.json_kinds import Kind, checked, count, fields, maybe, object_of, text
from octavo.capture.sealed import digest_of_file, open_regular, read_sealed, seal

if TYPE_CHECKING:
    from octavo.capture.fingerprint import Origin

MANIFEST = "octavo.manifest"  # file name of the manifest of a directory that holds one export and nothing else
PATTERN = "octavo*.manifest"  # glob pattern of all manifests; see manifest_for for the others
NOT_VERIFIABLE = "not verifiable: no manifest"
FORMAT = 1  # version of the manifest's content
_REMEDY = "Copy the file again, or calibrate again. If you changed it yourself, delete {}."
_KIND: Kind = fields(
    {"octavo": text, "files": object_of(fields({"bytes": count, "sha256": text}))},
    {"model": maybe(fields({"class": text, "names": text, "dtype": text, "weights": object_of(text)}))},
)


class Manifest(NamedTuple):
    """A manifest that was read.

    | field   | meaning                                                                                      |
    |---------|----------------------------------------------------------------------------------------------|
    | path    | path of the manifest                                                                         |
    | version | version of Octavo that wrote the manifest                                                    |
    | files   | size in bytes and SHA-256 of each file, by the file's path below the manifest's directory    |
    | model   | fingerprint of the float model that the files were made from, as JSON; None if not known     |
    """

    path: Path
    version: str
    files: Mapping[str, tuple[int, str]]
    model: Mapping[str, Any] | None

    @property
    def origin(self) -> "Origin | None":
        """The fingerprint of the float model that the files were made from; None if it is not known."""
        from octavo.capture.fingerprint import Origin  # needs torch, which verifying does not

        model = self.model
        return None if model is None else Origin(model["class"], model["names"], model["dtype"], model["weights"])

    @property
    def covers_directory(self) -> bool:
        """True if the manifest is for all files of its directory, so that a file that it does not list is out of place.
        Such a manifest is called octavo.manifest. Every other manifest is for the files of one export. Files of other
        exports may lie beside them."""
        return self.path.name == MANIFEST


class Verified(NamedTuple):
    """The result of comparing the files of a directory with its manifests: `manifests` are the manifests, `extra` the
    names of files that no manifest lists. If no manifest is called octavo.manifest, `extra` is empty, because each
    manifest is then for the files of one export, and files that no manifest lists may lie beside them."""

    manifests: tuple[Manifest, ...]
    extra: tuple[str, ...]

    @property
    def origin(self) -> "Origin | None":
        """The fingerprint of the float model that the files were made from; None if no manifest has it."""
        return next((manifest.origin for manifest in self.manifests if manifest.origin is not None), None)


def manifest_for(name: str) -> str:
    """Returns the file name of the manifest of the export called `name`, octavo-NAME.manifest. Other exports may be in
    the same directory, each with a manifest of its own."""
    return MANIFEST.replace(".", f"-{name}.")


def write_manifest(directory: Path, names: Iterable[str], modes: Modes, origin: "Origin | None", name: str) -> None:
    """Writes a manifest of the existing files `names` in `directory`, under the file name `name`, with the permissions
    `modes`. The manifest records `origin`, the fingerprint of the float model, if it is not None."""
    files = {
        file: {"bytes": (directory / file).stat().st_size, "sha256": digest_of_file(directory / file)}
        for file in sorted(names)
    }
    model = None
    if origin is not None:
        model = {"class": origin.kind, "names": origin.names, "dtype": origin.dtype, "weights": origin.weights}
    body = {"format": FORMAT, "octavo": version("octavo"), "files": files, "model": model}
    with create(directory / name, modes.data) as sink:
        sink.write(seal(body))


def write_manifests(directory: Path, modes: Modes, origin: "Origin | None") -> None:
    """Writes a manifest of all files of the export in `directory`, and another one in each of its folders, so that a
    folder can be verified after it is moved elsewhere.

    `modes` gives the manifests their file mode. `origin`, the fingerprint of the float model, is written into each
    manifest, or left out if it is None."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        write_manifest(folder, [path.name for path in folder.iterdir()], modes, origin, MANIFEST)
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    write_manifest(directory, names, modes, origin, MANIFEST)


def remove_file(directory: Path | str, name: str) -> None:
    """Removes the file `name` from a directory that holds one export, and its entry from the directory's only
    manifest."""
    (manifest,) = manifests_of(Path(directory))
    (manifest.path.parent / name).unlink()
    manifest.path.unlink()
    write_manifest(manifest.path.parent, set(manifest.files) - {name}, Modes(), manifest.origin, manifest.path.name)


def remove_manifests(directory: Path, names: Collection[str]) -> None:
    """Removes the manifests in `directory` that list one of the files `names`, which are about to be replaced. Damaged
    manifests stay."""
    for path in directory.glob(PATTERN):
        with suppress(OctavoError):
            if set(_read(path).files) & set(names):
                path.unlink()


def manifests_of(directory: Path, name: str | None = None) -> list[Manifest]:
    """Returns the manifests in a directory; if `name` is given, only the manifests that list the file of this name.
    Raises FileError for a manifest that is damaged."""
    manifests = [_read(path) for path in sorted(directory.glob(PATTERN))]
    return [manifest for manifest in manifests if name is None or name in manifest.files]


def _read(path: Path) -> Manifest:
    remedy = _REMEDY.format(path.name)
    body = read_sealed(Path(os.path.realpath(path)), remedy).body
    if isinstance(body, dict) and type(body.get("format")) is int and body["format"] > FORMAT:
        raise FileError(f"{path}: has format {body['format']}, but this version reads {FORMAT}. Upgrade Octavo.")
    content = checked(body, _KIND, path, remedy)
    for name in content["files"]:
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise damage(path, f"names a file outside its directory ({name!r})", remedy)
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    return Manifest(path, content["octavo"], files, content.get("model"))


def verify(directory: Path, names: Collection[str] | None = None, *, digests: bool = True) -> Verified:
    """Compares the files of a directory with its manifests: first the sizes, then, if `digests` is True, the SHA-256.

    With `names`, only the files of these names are compared. Returns the manifests of the directory, and the files that
    none of them lists; both are empty if the directory has no manifest. Raises FileError for a file that is missing or
    differs, and for a manifest that is damaged.
    """
    manifests = manifests_of(directory)
    for manifest in manifests:
        remedy = _REMEDY.format(manifest.path.name)
        files = {name: entry for name, entry in manifest.files.items() if names is None or name in names}
        for name, (size, _) in files.items():
            path = Path(os.path.realpath(directory / name))  # the cache of a hub holds links
            with open_regular(path, f"{manifest.path.name} lists it. {remedy}") as (_, actual):
                if actual != size:
                    raise damage(directory / name, f"damaged (has {actual} bytes, not {size})", remedy)
        for name, (_, digest) in files.items() if digests else ():
            if digest_of_file(Path(os.path.realpath(directory / name)), remedy) != digest:
                raise damage(directory / name, "damaged (checksum)", remedy)
    return Verified(tuple(manifests), tuple(_extra(directory, manifests)))


def _extra(directory: Path, manifests: Collection[Manifest]) -> Iterator[str]:
    """Yields the names of files and folders that none of `manifests` lists. Looks in `directory` itself, and in each
    folder inside it that holds a listed file. Leaves out names that begin with a dot.

    Yields nothing if no manifest is called octavo.manifest, because each manifest is then for the files of one export,
    and files that no manifest lists may lie beside them.
    """
    if not any(manifest.covers_directory for manifest in manifests):
        return
    listed = {name for manifest in manifests for name in (*manifest.files, manifest.path.name)}
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for folder in sorted(folders):
        try:
            paths = sorted((directory / folder).iterdir())
        except OSError as error:
            raise storage_error(directory / folder, error) from error
        for path in paths:
            name = path.relative_to(directory).as_posix()
            if name not in listed and name not in folders and not path.name.startswith("."):
                yield name
