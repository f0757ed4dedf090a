"""Writes and verifies manifests, which hold the SHA-256 and the size of each file of an export, the fingerprint of the
float model, and the version of Octavo.

A manifest lies beside the files, sealed as the files of a capture are. No consumer reads a file of its name: MindIE-SD
opens the description that it is given and the weights that are named after it, SGLang the first file that begins with
quant_model_description, diffusers config.json and diffusion_pytorch_model*, onnxruntime and Ascend's compiler the graph
and the data that it names.
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

MANIFEST = "octavo.manifest"  # of a directory that an export has written as a whole
PATTERN = "octavo*.manifest"
NOT_VERIFIABLE = "not verifiable: no manifest"
FORMAT = 1  # version of the manifest
_REMEDY = "Copy it anew or calibrate again; after a change that you made yourself, delete {}."
_KIND: Kind = fields(
    {"octavo": text, "files": object_of(fields({"bytes": count, "sha256": text}))},
    {"model": maybe(fields({"class": text, "names": text, "dtype": text, "weights": object_of(text)}))},
)


class Manifest(NamedTuple):
    """A manifest: its path, the version of Octavo that wrote it, bytes and SHA-256 of each file by path below its
    directory, and what it says of the float model that the files were made of, where that is known."""

    path: Path
    version: str
    files: Mapping[str, tuple[int, str]]
    model: Mapping[str, Any] | None

    @property
    def origin(self) -> "Origin | None":
        """The float model that the files were made of, where that is known."""
        from octavo.capture.fingerprint import Origin  # needs torch, which verifying does not

        model = self.model
        return None if model is None else Origin(model["class"], model["names"], model["dtype"], model["weights"])

    @property
    def whole(self) -> bool:
        """Whether the directory holds this export alone."""
        return self.path.name == MANIFEST


class Verified(NamedTuple):
    """The manifests of a directory, and the names of files that no manifest lists where one is for all."""

    manifests: tuple[Manifest, ...]
    extra: tuple[str, ...]

    @property
    def origin(self) -> "Origin | None":
        """The float model that the files were made of, where a manifest says so."""
        return next((each.origin for each in self.manifests if each.origin is not None), None)


def manifest_for(name: str) -> str:
    """The name of the manifest of the export `name` in a directory that may hold other exports."""
    return MANIFEST.replace(".", f"-{name}.")


def write_manifest(directory: Path, names: Iterable[str], modes: Modes, origin: "Origin | None", name: str) -> None:
    """Writes the manifest `name` over the files `names` in `directory`, after all of them."""
    files = {
        each: {"bytes": (directory / each).stat().st_size, "sha256": digest_of_file(directory / each)}
        for each in sorted(names)
    }
    model = None
    if origin is not None:
        model = {"class": origin.kind, "names": origin.names, "dtype": origin.dtype, "weights": origin.weights}
    body = {"format": FORMAT, "octavo": version("octavo"), "files": files, "model": model}
    with create(directory / name, modes.data) as sink:
        sink.write(seal(body))


def write_manifests(directory: Path, modes: Modes, origin: "Origin | None") -> None:
    """Writes a manifest over all files of an export in `directory`, and one in each folder, which may go elsewhere."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        write_manifest(folder, [path.name for path in folder.iterdir()], modes, origin, MANIFEST)
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    write_manifest(directory, names, modes, origin, MANIFEST)


def leave_out(directory: Path | str, name: str) -> None:
    """Removes the file `name` from an export that has a directory to itself, and from its manifest."""
    (manifest,) = manifests_of(Path(directory))
    (manifest.path.parent / name).unlink()
    manifest.path.unlink()
    write_manifest(manifest.path.parent, set(manifest.files) - {name}, Modes(), manifest.origin, manifest.path.name)


def forget(directory: Path, names: Collection[str]) -> None:
    """Removes the manifests in `directory` that list one of `names`, files that are about to be replaced."""
    for path in directory.glob(PATTERN):
        with suppress(OctavoError):
            if set(_read(path).files) & set(names):
                path.unlink()


def manifests_of(directory: Path, name: str | None = None) -> list[Manifest]:
    """The manifests in a directory; with `name` those that list this file. Raises FileError for a damaged one."""
    found = [_read(path) for path in sorted(directory.glob(PATTERN))]
    return [each for each in found if name is None or name in each.files]


def _read(path: Path) -> Manifest:
    remedy = _REMEDY.format(path.name)
    body = read_sealed(Path(os.path.realpath(path)), remedy).body
    if isinstance(body, dict) and type(body.get("format")) is int and body["format"] > FORMAT:
        raise FileError(f"{path}: written by format {body['format']}; this version reads {FORMAT}. Upgrade.")
    content = checked(body, _KIND, path, remedy)
    for name in content["files"]:
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise damage(path, f"names a file outside its directory ({name!r})", remedy)
    files = {name: (each["bytes"], each["sha256"]) for name, each in content["files"].items()}
    return Manifest(path, content["octavo"], files, content.get("model"))


def verify(directory: Path, names: Collection[str] | None = None, *, digests: bool = True) -> Verified:
    """Compares the files of a directory with its manifests: sizes first, and with `digests` every byte; only the files
    `names` if given.

    Raises FileError for a file that is missing or differs. A directory without manifests gives no manifests.
    """
    manifests = manifests_of(directory)
    for manifest in manifests:
        remedy = _REMEDY.format(manifest.path.name)
        wanted = {name: each for name, each in manifest.files.items() if names is None or name in names}
        for name, (size, _) in wanted.items():
            path = Path(os.path.realpath(directory / name))  # the cache of a hub holds links
            with open_regular(path, f"{manifest.path.name} lists it. {remedy}") as (_, found):
                if found != size:
                    raise damage(directory / name, f"damaged (checksum: {found} bytes, not {size})", remedy)
        for name, (_, digest) in wanted.items() if digests else ():
            if digest_of_file(Path(os.path.realpath(directory / name)), remedy) != digest:
                raise damage(directory / name, "damaged (checksum)", remedy)
    return Verified(tuple(manifests), tuple(_extra(directory, manifests)))


def _extra(directory: Path, manifests: Collection[Manifest]) -> Iterator[str]:
    """Yields what is in a directory beside the files of its manifests; nothing where other files are usual."""
    if not any(each.whole for each in manifests):
        return
    listed = {name for each in manifests for name in each.files} | {each.path.name for each in manifests}
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for folder in sorted(folders):
        try:
            inside = sorted((directory / folder).iterdir())
        except OSError as error:
            raise storage_error(directory / folder, error) from error
        for path in inside:
            name = path.relative_to(directory).as_posix()
            if name not in listed and name not in folders and not path.name.startswith("."):
                yield name
