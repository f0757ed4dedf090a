"""Reads a model directory of diffusers: config.json, and one weight file or several with an index.

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
_DESCRIPTIONS = "quant_model_description*.json"  # descriptions of msModelSlim, which stand for a quantization_config
_DESCRIBED_WEIGHTS = "quant_model_weight*.safetensors"  # the weight files that such a description may have
# regular expression of the names of the files in such a directory
MODEL_FILES = r"config\.json|diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


class StoredTensor(NamedTuple):
    """Holds where a tensor is stored: the path of its file, and its dtype, shape and byte offsets in the file."""

    path: Path
    stored: Stored

    def read(self) -> Array:
        """Reads the values of the tensor, converting bfloat16 to float32."""
        return read_array(self.path, self.stored)

    def bits(self) -> Array:
        """Reads a tensor of 8-bit numbers, such as float8_e4m3fn, as uint8 with the same bits."""
        return read_array(self.path, self.stored._replace(dtype="uint8"))


class Model(NamedTuple):
    """Holds a diffusers model directory: the content of config.json; a dict from name to stored tensor; and the
    metadata in the headers of the weight files, merged into one dict."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config in config.json; {} without one."""
        content = self.config.get("quantization_config")
        return content if isinstance(content, dict) else {}

    @property
    def int8_layers(self) -> list[str]:
        """The names of the layers whose weight is int8."""
        names = (name for name, tensor in self.tensors.items() if tensor.stored.dtype == "int8")
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    @property
    def coded(self) -> bool:
        """True if there are weights in 8-bit codes: int8 tensors, or FP8 tensors with a scale beside them. Without a
        quantization_config, diffusers would take such codes for float weights. An FP8 tensor without a scale holds
        float weights in FP8."""
        leaves = (f"{name.removesuffix('weight')}weight_scale" for name in self._fp8 if name.endswith("weight"))
        parts = (f"{name.removesuffix('qdata')}scale" for name in self._fp8 if name.endswith("._weight_qdata"))
        integers = any(tensor.stored.dtype == "int8" for tensor in self.tensors.values())
        return integers or any(name in self.tensors for name in (*leaves, *parts))

    @property
    def _fp8(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.stored.dtype == "float8_e4m3fn"]

    @classmethod
    def open(cls, directory: Path) -> "Model":
        """Opens a model directory: reads config.json and the headers of the weight files.

        Raises FileError for files that are missing or damaged.
        """
        tensors: dict[str, StoredTensor] = {}
        metadata: dict[str, str] = {}
        for path in weight_files(directory):
            header, file_metadata = read_header(path)
            tensors |= {name: StoredTensor(path, stored) for name, stored in header.items()}
            metadata |= file_metadata
        config = read_json(directory / CONFIG_FILE)
        check_layers(config, len(tensors), directory / CONFIG_FILE)
        return cls(config, tensors, metadata)


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in the file at `path`. Raises FileError for a file that is missing or is not a JSON
    object."""
    return json_object(read_bytes(path), path, finite=False)


def weight_files(directory: Path) -> list[Path]:
    """Returns the paths of the weight files in a directory: all that the index lists, or the single file where there is
    no index. Raises FileError for an index that is damaged."""
    if not (directory / INDEX_FILE).is_file():
        return [directory / WEIGHT_FILE]
    index = checked(read_json(directory / INDEX_FILE), fields({"weight_map": object_of(text)}), directory / INDEX_FILE)
    names = index["weight_map"]
    return [directory / Path(name).name for name in sorted(set(names.values()))]


def find_method(directory: Path, method: str, folder: str) -> Path | None:
    """Looks in `directory` and then in its subfolder `folder` for a model with the quant_method `method`, and returns
    the path of the first one. Returns None if neither holds one.

    A directory is also returned if its quant_method cannot be read because a file is damaged, so that a check reports
    the damage.
    """
    for path in (directory, directory / folder):
        try:
            if method_at(path) == method:
                return path
        except OctavoError:
            return path
    return None


def find_intact(directory: Path, method: str, folder: str) -> Path | None:
    """Looks in `directory` and then in its subfolder `folder` for a model with the quant_method `method`, and returns
    the path of the first one. Returns None if neither holds one.

    A damaged `directory` is passed over, because the searches for the formats `diffusers` and `torchao` return it, so
    that their checks report the damage. A damaged subfolder is returned, so that a check reports its damage.
    """
    try:
        if method_at(directory) == method:
            return directory
    except OctavoError:
        pass
    try:
        return directory / folder if method_at(directory / folder) == method else None
    except OctavoError:
        return directory / folder


def method_at(directory: Path) -> str | None:
    """Returns the quant_method in the config.json of a directory. If config.json has no quantization_config, returns
    "modelslim" for 8-bit weights that a description of msModelSlim beside them describes, and None for float weights.
    Returns None too if there are neither config.json nor weights.

    Raises FileError if config.json is damaged, if it is missing beside weights, or if it has no quantization_config
    although the weights are 8-bit codes and there is no description.
    """
    path = directory / CONFIG_FILE
    weights = [name for name in (WEIGHT_FILE, INDEX_FILE) if (directory / name).is_file()]
    if not path.is_file():
        if weights:
            raise damage(path, "missing", f"Copy the file into the directory of {weights[0]}, or calibrate again.")
        return None
    content = read_json(path).get("quantization_config")
    if isinstance(content, dict):
        return str(content.get("quant_method"))
    if weights and Model.open(directory).coded:
        described = any(directory.glob(_DESCRIPTIONS)) and not any(directory.glob(_DESCRIBED_WEIGHTS))
        if described:  # a description with a weight file of its own is of other weights
            return "modelslim"
        fact = "has no quantization_config, although the weights beside it are 8-bit codes"
        raise damage(path, fact, "Copy the file again, or calibrate again.")
    return None
