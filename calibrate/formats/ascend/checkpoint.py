"""Reads the files of an ascend checkpoint: description, tensors and metadata, each checked before use.

Importing this module needs no torch.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octavo.capture.arrays import Array, read_array, read_header
from octavo.capture.errors import FileError, damage
from octavo.capture.sealed import json_object, read_bytes
from octavo.capture.store.headers import Stored

from ...layers.schemes import SCHEMES
from .names import (
    CORRECTED,
    DESCRIPTION_FILE,
    EDGES,
    GEOMETRY,
    INNER,
    LEVELS,
    MADE_BIASES,
    MODEL_TYPE,
    MUL_SCALE,
    WEIGHT_FILE,
)

FLOATS = ("float32", "float16", "bfloat16")  # dtypes of models
_DESCRIPTION_LIMIT = 64 << 20  # bytes; the largest description that is read, far above any that is written
_WEIGHT = ".weight"
_LARGEST = float(np.finfo(np.float32).max)


class Convolution(NamedTuple):
    """The numbers of `layers.modules.Geometry`, which needs torch."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    padding_mode: str
    groups: int


class Checkpoint:
    """An ascend checkpoint open for reading: its description, and the place of each tensor in the weight file.

    Raises FileError for files that are missing, damaged or not this format.
    """

    def __init__(self, directory: Path | str, names: tuple[str, str] | None = None) -> None:
        self.directory = Path(directory)
        weight_name, description_name = names or find(self.directory)
        self.weight_path, self.description_path = self.directory / weight_name, self.directory / description_name
        self.description = read_description(self.description_path)
        self.tensors, self.metadata = read_header(self.weight_path)
        self.scheme = self.description.get(MODEL_TYPE)
        if self.scheme not in SCHEMES:
            raise damage(self.description_path, f"{MODEL_TYPE} is {self.scheme!r}", f"Known are {', '.join(SCHEMES)}.")
        self.schemes = self._schemes()

    def _schemes(self) -> dict[str, str]:
        """The scheme of each quantized layer by name. X.linear.weight belongs to X where X has a multiplier."""
        found = {}
        for key, word in self.description.items():
            if word in SCHEMES and key.endswith(_WEIGHT):
                name = key.removesuffix(_WEIGHT)
                outer = name.removesuffix("." + INNER[:-1])
                found[outer if f"{outer}.{MUL_SCALE}" in self.tensors else name] = word
        return found

    @property
    def layer_names(self) -> list[str]:
        """The names of the quantized layers."""
        return list(self.schemes)

    def prefix(self, name: str) -> str:
        """The prefix of the names of a layer's tensors."""
        return f"{name}.{INNER}" if f"{name}.{MUL_SCALE}" in self.tensors else f"{name}."

    def read(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Array:
        """Reads one tensor, bfloat16 as float32. Raises FileError for a dtype outside `dtypes` or another shape."""
        stored = self.tensors.get(key)
        if stored is None:
            raise damage(self.weight_path, f"{key} is missing")
        if stored.dtype not in dtypes or (shape is not None and stored.shape != shape):
            raise damage(self.weight_path, f"{key} is {words(stored)}")
        return read_array(self.weight_path, stored)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of each row of a W8A8_TIMESTEP layer: the denoising steps that the file was written for."""
        found = self._metadata(LEVELS, [])
        if not (isinstance(found, list) and all(_finite(level) for level in found)):
            raise damage(self.weight_path, f"{LEVELS} in its metadata is not a list of numbers")
        return tuple(map(float, found))

    def edges(self, name: str) -> Array:
        """The edges between the bins of a W8A8_TIMESTEP layer, in float32."""
        by_layer = self._metadata(EDGES, {})
        found = by_layer.get(name) if isinstance(by_layer, dict) else None
        if isinstance(found, list) and all(_finite(edge) for edge in found):
            edges = np.array(found, np.float32)
            if bool(np.isfinite(edges).all()) and bool((np.diff(edges) > 0).all()):
                return edges
        raise damage(self.weight_path, f"{name}: the noise levels of its rows are not known")

    def corrected(self, name: str) -> bool:
        """Whether the layer was written with a quant_bias that carries more than its bias."""
        return self._listed(CORRECTED, name)

    def made_bias(self, name: str) -> bool:
        """Whether the layer has a bias that its float form has not."""
        return self._listed(MADE_BIASES, name)

    def convolution(self, name: str) -> Convolution:
        """The stride, padding, dilation and groups of a convolution. Raises FileError where the metadata lack them."""
        try:
            found = self._metadata(GEOMETRY, {})[name]
            values = [found["stride"], found["padding"], found["dilation"]]
            stride, padding, dilation = (tuple(int(number) for number in value) for value in values)
            groups = int(found.get("groups", 1))
            if (len(stride), len(padding), len(dilation)) != (2, 4, 2) or min(*stride, *dilation, groups) < 1:
                raise ValueError("sizes")
            return Convolution(stride, padding, dilation, str(found["padding_mode"]), groups)  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError) as error:
            fact = f"{name}.weight is a convolution of unknown stride and padding"
            raise damage(self.weight_path, fact) from error

    def _listed(self, key: str, name: str) -> bool:
        found = self._metadata(key, [])
        return isinstance(found, list) and name in found

    def _metadata(self, key: str, default: Any) -> Any:
        try:
            return json.loads(self.metadata[key]) if key in self.metadata else default
        except (ValueError, RecursionError) as error:
            raise damage(self.weight_path, f"{key} in its metadata is not valid JSON") from error


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # False for NaN


def find(directory: Path) -> tuple[str, str]:
    """The file names of weights and description in a directory: those of one process, or of the first rank of several.
    Raises FileError without a description."""
    for scheme in SCHEMES:
        name = DESCRIPTION_FILE.format(scheme.lower())
        ranks = sorted(path.name for path in directory.glob(name.replace(".json", "_*.json")) if rank_of(path.stem))
        for found in [name] * (directory / name).is_file() + ranks:
            return WEIGHT_FILE.format(scheme.lower() + rank_of(Path(found).stem)), found
    wanted = DESCRIPTION_FILE.format("w8a8")
    raise FileError(f"{directory}: no ascend checkpoint (no {wanted}). Give the directory of one.")


def rank_of(stem: str) -> str:
    """The end of a file's stem that stands for a rank, such as _0, as MindIE-SD reads it; "" without one."""
    found = re.search(r"_\d+$", stem)
    return found[0] if found else ""


def read_description(path: Path) -> dict[str, str]:
    """Reads the description: the scheme, or FLOAT, of each tensor by name."""
    found = json_object(read_bytes(path, _DESCRIPTION_LIMIT), path)
    if not all(isinstance(word, str) for word in found.values()):
        raise damage(path, "not a description of tensors")
    return found


def words(stored: Stored) -> str:
    """Dtype and shape of a stored tensor."""
    return f"{stored.dtype} {list(stored.shape)}"
