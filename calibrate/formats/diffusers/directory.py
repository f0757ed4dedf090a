"""A directory as diffusers lays it out: config.json, one weight file or several with an index.

Importing this module needs no torch.
"""

from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.arrays import Array, read_array, read_header
from octavo.capture.errors import OctavoError, damage
from octavo.capture.json_kinds import check_layers, checked, fields, object_of, text
from octavo.capture.sealed import json_object, read_bytes
from octavo.capture.store.headers import Stored

CONFIG_FILE = "config.json"
WEIGHT_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
WEIGHT_FILE = WEIGHT_PATTERN.format(suffix="")
INDEX_FILE = WEIGHT_FILE + ".index.json"
# the names of the files of such a directory, as a regular expression
MODEL_FILES = r"config\.json|diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


class StoredTensor(NamedTuple):
    """A tensor in one of the files."""

    path: Path
    stored: Stored

    def read(self) -> Array:
        """Reads the tensor's values, bfloat16 as float32."""
        return read_array(self.path, self.stored)


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
        config = read_json(directory / CONFIG_FILE)
        check_layers(config, len(tensors), directory / CONFIG_FILE)
        return cls(config, tensors, metadata)


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises FileError when there is none."""
    return json_object(read_bytes(path), path, finite=False)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: the only one, or all that the index names."""
    if not (directory / INDEX_FILE).is_file():
        return [directory / WEIGHT_FILE]
    index = checked(read_json(directory / INDEX_FILE), fields({"weight_map": object_of(text)}), directory / INDEX_FILE)
    names = index["weight_map"]
    return [directory / Path(name).name for name in sorted(set(names.values()))]


def find_method(directory: Path, method: str, folder: str) -> Path | None:
    """The directory itself or its `folder`, whichever has `method` as quant_method, or has no method that can be read;
    None where neither has."""
    for place in (directory, directory / folder):
        try:
            if method_at(place) == method:
                return place
        except OctavoError:
            return place
    return None


def method_at(directory: Path) -> str | None:
    """The quant_method of a directory for diffusers; None for a float model, and for any other directory.

    Raises FileError for weights whose config.json is missing or damaged, and for integers without a method.
    """
    path = directory / CONFIG_FILE
    weights = [name for name in (WEIGHT_FILE, INDEX_FILE) if (directory / name).is_file()]
    if not path.is_file():
        if weights:
            raise damage(path, "missing", f"Copy it to {weights[0]}, or calibrate again.")
        return None
    found = read_json(path).get("quantization_config")
    if isinstance(found, dict):
        return str(found.get("quant_method"))
    if weights and any(place.stored.dtype == "int8" for place in Model.open(directory).tensors.values()):
        raise damage(path, "has no quantization_config for the integers beside it", "Copy it anew or calibrate again.")
    return None
