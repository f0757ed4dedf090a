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

from .names import (
    CORRECTED,
    DESCRIPTION_FILE,
    DTYPE,
    EDGES,
    GEOMETRY,
    HELD,
    INNER,
    LEVELS,
    MADE_BIASES,
    MODEL_TYPE,
    MUL_SCALE,
    QUANT_TYPE,
    WEIGHT_FILE,
)

FLOATS = ("float32", "float16", "bfloat16")  # dtypes that the float tensors of a model may have
_DESCRIPTION_LIMIT = 64 << 20  # bytes; a larger description is refused. Real ones are far smaller
_WEIGHT = ".weight"
_LARGEST = float(np.finfo(np.float32).max)  # largest noise level or edge that is accepted
_REMEDY = "Copy the checkpoint again, or calibrate again."


class Convolution(NamedTuple):
    """The geometry of a convolution. It has the same fields as `layers.modules.Geometry`, but needs no torch.

    `padding` is (left, right, top, bottom); `stride` and `dilation` are (vertical, horizontal). `padding_mode` and
    `groups` are as in nn.Conv2d.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    padding_mode: str
    groups: int


class Checkpoint:
    """An ascend checkpoint open for reading: its description, and the dtype, shape and byte offset of each tensor.

    `names` are the names of the weight file and the description in `directory`. If `names` is None, the files are
    looked for under the names that MindIE-SD expects. Raises FileError for files that are missing, damaged or in
    another format.
    """

    def __init__(self, directory: Path | str, names: tuple[str, str] | None = None) -> None:
        self.directory = Path(directory)
        weight_name, description_name = names or file_names_in(self.directory)
        self.weight_path, self.description_path = self.directory / weight_name, self.directory / description_name
        self.description = read_description(self.description_path)
        self.tensors, self.metadata = read_header(self.weight_path)
        self.scheme = self.description.get(MODEL_TYPE)
        if self.scheme not in HELD:
            fact = f"{MODEL_TYPE} is {self.scheme!r}, an unknown scheme"
            raise damage(self.description_path, fact, f"Upgrade Octavo; this version reads {', '.join(HELD)}.")
        self.schemes = self._schemes()

    def _schemes(self) -> dict[str, str]:
        """Returns a dict from the name of each integer layer to its scheme. If a layer X has a smoothing multiplier,
        the description names its weight X.linear.weight, not X.weight; the key in the dict is still X."""
        schemes = {}
        for key, word in self.description.items():
            if word in HELD and key.endswith(_WEIGHT):
                name = key.removesuffix(_WEIGHT)
                outer = name.removesuffix("." + INNER[:-1])
                schemes[outer if f"{outer}.{MUL_SCALE}" in self.tensors else name] = word
        return schemes

    @property
    def attention(self) -> dict[str, str]:
        """A dict from the name of each module with quantized attention to the type of the attention."""
        end = f".{QUANT_TYPE}"
        return {key.removesuffix(end): word for key, word in self.description.items() if key.endswith(end)}

    @property
    def layer_names(self) -> list[str]:
        """The names of the integer layers in the checkpoint."""
        return list(self.schemes)

    def prefix(self, name: str) -> str:
        """Returns the prefix of the names of a layer's tensors: "NAME.", or "NAME.linear." if the layer has a smoothing
        multiplier. `name` is the layer's NAME."""
        return f"{name}.{INNER}" if f"{name}.{MUL_SCALE}" in self.tensors else f"{name}."

    def read(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Array:
        """Returns the values of the tensor called `key`, bfloat16 converted to float32; of a float8_e4m3fn tensor, the
        bits as uint8. Raises FileError if the tensor is missing, if its dtype is not in `dtypes` (names such as
        "bfloat16"), or if its shape is not `shape`; None allows any shape."""
        stored = self.tensors.get(key)
        if stored is None:
            raise damage(self.weight_path, f"{key} is missing", _REMEDY)
        if stored.dtype not in dtypes or (shape is not None and stored.shape != shape):
            raise damage(self.weight_path, f"{key} is {dtype_and_shape(stored)}, which no export writes", _REMEDY)
        if stored.dtype == "float8_e4m3fn":
            stored = stored._replace(dtype="uint8")
        return read_array(self.weight_path, stored)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels of the denoising steps for which the checkpoint was written; empty if there are no
        W8A8_TIMESTEP layers. Each W8A8_TIMESTEP layer has one row of scales, zero points, deq and quant_bias for each
        of these levels. If the export was given no denoising steps, it chose the levels, at least one in each timestep
        bin.

        Reading the property raises FileError if the metadata of the weight file are damaged.
        """
        levels = self._metadata(LEVELS, [])
        if not (isinstance(levels, list) and all(_finite(level) for level in levels)):
            raise damage(self.weight_path, f"{LEVELS} in its metadata is not a list of numbers", _REMEDY)
        return tuple(map(float, levels))

    def edges(self, name: str) -> Array:
        """Returns the noise levels that separate the timestep bins of the W8A8_TIMESTEP layer `name`, (bins - 1,)
        float32, increasing. Raises FileError if the metadata of the weight file lack them."""
        by_layer = self._metadata(EDGES, {})
        numbers = by_layer.get(name) if isinstance(by_layer, dict) else None
        if isinstance(numbers, list) and all(_finite(edge) for edge in numbers):
            edges = np.array(numbers, np.float32)
            if bool(np.isfinite(edges).all()) and bool((np.diff(edges) > 0).all()):
                return edges
        fact = f"{EDGES} in its metadata does not give increasing noise levels for {name}"
        raise damage(self.weight_path, fact, _REMEDY)

    def has_bias_correction(self, name: str) -> bool:
        """Returns whether a bias correction is part of quant_bias, the int32 number that the layer `name` adds to its
        sum of products."""
        return self._listed(CORRECTED, name)

    def made_bias(self, name: str) -> bool:
        """Returns whether the integer layer `name` has a bias although its float layer has none. It then has the bias
        only for its bias correction."""
        return self._listed(MADE_BIASES, name)

    @property
    def float_dtype(self) -> str | None:
        """The dtype, such as "bfloat16", that the W8A8_MXFP8 layers had in the float model; None if the file does not
        say."""
        dtype = self._metadata(DTYPE, None)
        return dtype if dtype in FLOATS else None

    def convolution(self, name: str) -> Convolution:
        """Returns the stride, padding, dilation and groups of the convolution `name`. Raises FileError if the metadata
        of the weight file lack them."""
        try:
            content = self._metadata(GEOMETRY, {})[name]
            values = [content["stride"], content["padding"], content["dilation"]]
            stride, padding, dilation = (tuple(int(number) for number in value) for value in values)
            groups = int(content.get("groups", 1))
            if (len(stride), len(padding), len(dilation)) != (2, 4, 2) or min(*stride, *dilation, groups) < 1:
                raise ValueError("sizes")
            return Convolution(stride, padding, dilation, str(content["padding_mode"]), groups)  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError) as error:
            fact = f"{GEOMETRY} in its metadata does not give stride, padding and dilation of the convolution {name}"
            raise damage(self.weight_path, fact, _REMEDY) from error

    def _listed(self, key: str, name: str) -> bool:
        names = self._metadata(key, [])
        return isinstance(names, list) and name in names

    def _metadata(self, key: str, default: Any) -> Any:
        try:
            return json.loads(self.metadata[key]) if key in self.metadata else default
        except (ValueError, RecursionError) as error:
            raise damage(self.weight_path, f"{key} in its metadata is not valid JSON", _REMEDY) from error


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # False for NaN


def file_names_in(directory: Path) -> tuple[str, str]:
    """Returns the names of two files in a directory: the weight file, and the description, the JSON file that gives the
    scheme of each tensor. They are the files that a single process wrote, or if there are none, the files of the first
    rank of a distributed run. Raises FileError if there is no description."""
    for scheme in HELD:
        name = DESCRIPTION_FILE.format(scheme.lower())
        ranks = sorted(path.name for path in directory.glob(name.replace(".json", "_*.json")) if rank_of(path.stem))
        for description in [name] * (directory / name).is_file() + ranks:
            return WEIGHT_FILE.format(scheme.lower() + rank_of(Path(description).stem)), description
    name = DESCRIPTION_FILE.format("w8a8")
    fact = f"no ascend checkpoint, because it has no {name}"
    raise FileError(f"{directory}: {fact}. Give the directory of an ascend checkpoint.")


def rank_of(stem: str) -> str:
    """Returns the part of a file name that says which rank (process of a distributed run) the file is for, such as
    "_0"; "" if there is none. `stem` is the file name without extension. The part is the underscore and the digits at
    the end of `stem`. MindIE-SD reads the rank of a file in the same way."""
    match = re.search(r"_\d+$", stem)
    return match[0] if match else ""


def read_description(path: Path) -> dict[str, str]:
    """Reads the description of a checkpoint, a JSON object. Its keys are the names of the tensors; the value is the
    scheme of the tensor, or "FLOAT". The key "model_quant_type" has the scheme of the model.

    Raises FileError for a file that is not a JSON object, or has a value that is not a string.
    """
    description = json_object(read_bytes(path, _DESCRIPTION_LIMIT), path)
    if not all(isinstance(word, str) for word in description.values()):
        raise damage(path, "not a description of tensors, because a value in it is not a string", _REMEDY)
    return description


def dtype_and_shape(stored: Stored) -> str:
    """Returns the dtype and the shape of a stored tensor as text, such as "int8 [64, 32]"."""
    return f"{stored.dtype} {list(stored.shape)}"
