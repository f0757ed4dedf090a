"""A directory as diffusers lays it out: config.json, one weight file or several with an index."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from octavo.capture.errors import OctavoError, damage
from octavo.capture.sealed import json_object, read_bytes
from octavo.capture.tensors import Stored, read_header, read_tensor

from .write import CONFIG_FILE, INDEX_FILE, WEIGHT_FILE

# the names of the files of such a directory, as a regular expression
MODEL_FILES = r"config\.json|diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


class StoredTensor(NamedTuple):
    """A tensor in one of the files."""

    path: Path
    stored: Stored

    def read(self) -> Tensor:
        """Reads the tensor's values."""
        return read_tensor(self.path, self.stored)


class Model(NamedTuple):
    """A directory as diffusers reads it: config, tensors by name, and the metadata of the weight files."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config of the config; {} without one."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @classmethod
    def open(cls, directory: Path) -> "Model":
        """Opens a directory. Raises FileError for files that are missing or damaged."""
        tensors: dict[str, StoredTensor] = {}
        metadata: dict[str, str] = {}
        for path in weight_files(directory):
            found, said = read_header(path)
            tensors |= {name: StoredTensor(path, stored) for name, stored in found.items()}
            metadata |= said
        return cls(read_json(directory / CONFIG_FILE), tensors, metadata)


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises FileError when there is none."""
    return json_object(read_bytes(path), path)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: the only one, or all that the index names."""
    if not (directory / INDEX_FILE).is_file():
        return [directory / WEIGHT_FILE]
    names = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise damage(directory / INDEX_FILE, "not an index of weight files")
    return [directory / Path(name).name for name in sorted(set(names.values()))]


def find_method(directory: Path, method: str, folder: str) -> Path | None:
    """The directory itself or its `folder`, whichever has `method` as quant_method; None where neither has."""
    for place in (directory, directory / folder):
        with suppress(OctavoError):
            if method_at(place) == method:
                return place
    return None


def method_at(directory: Path) -> str | None:
    """The quant_method of a directory for diffusers; None for any other directory."""
    if not (directory / CONFIG_FILE).is_file():
        return None
    found = read_json(directory / CONFIG_FILE).get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, dict) else None
