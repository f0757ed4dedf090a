"""Defines the names in a file in format `comfy`, and reads what such a file contains. A marker is the JSON object that
says how a layer is quantized. Importing this module needs no torch."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.arrays import read_array, read_header
from octavo.capture.errors import OctavoError
from octavo.capture.store.headers import Stored

FILE = "diffusion_model_int8.safetensors"  # for int8 layers, also beside layers of other kinds
FILES = (FILE, "diffusion_model_fp8.safetensors", "diffusion_model_mxfp8.safetensors")  # the last two: FP8, MXFP8 only
MARKER = "comfy_quant"  # last part of the name of a layer's marker
ATTENTION = "comfy_attention.config"  # last parts of the name of an attention module's config, a JSON object
METADATA = "_quantization_metadata"  # key of the file's metadata with all markers
VERSION = "1.0"  # version of the content of METADATA
INT8 = "int8_tensorwise"
FP8 = "float8_e4m3fn"  # the name of the format of FP8 layers, and of the dtype of codes in FP8 and MXFP8
MXFP8 = "mxfp8"
FULL_PRECISION = "full_precision_matrix_mult"  # key of a marker: inputs stay float, and weights become float
SCALED = "scaled_fp8"  # name of the tensor that says that scales have the old names, OLD_NAMES
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
GROUP = 256  # channels in a group of a rotation whose marker does not say the number
PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.")  # before all names of files with more parts
_MARKER_LIMIT = 1 << 16  # bytes; no marker is longer

Marker = dict[str, Any]


def file_for(kinds: Collection[str]) -> str:
    """Returns the name of the safetensors file for layers of these `kinds`, such as "diffusion_model_fp8.safetensors"
    if all are FP8."""
    return {frozenset((FP8,)): FILES[1], frozenset((MXFP8,)): FILES[2]}.get(frozenset(kinds), FILE)


def marker_of(kind: str, group: int | None) -> Marker:
    """Returns the marker of a layer of this `kind`, such as INT8: a dict that says how the layer is quantized. `group`
    is the number of channels in a group of the layer's rotation; None if its input is not rotated."""
    return {"format": kind} | ({} if group is None else {"convrot": True, "convrot_groupsize": group})


def rotation_of(marker: Marker) -> Any:
    """Returns the group size of the rotation, in channels, that ComfyUI would apply to the input of a layer with this
    `marker`; None if it would not rotate the input. The group size is not checked, and may be a value of any type."""
    params = marker.get("params")
    both = (params if isinstance(params, dict) else {}) | marker
    return both.get("convrot_groupsize", GROUP) if both.get("convrot") else None


class Content(NamedTuple):
    """The contents of a safetensors file that determine how ComfyUI reads its quantized layers. A marker is a dict that
    says how a layer is quantized.

    | field    | meaning                                                                                            |
    |----------|----------------------------------------------------------------------------------------------------|
    | path     | path of the file                                                                                   |
    | tensors  | dict from tensor name to dtype, shape and byte offset                                              |
    | markers  | dict from layer name to the marker in the layer's tensor `comfy_quant`                             |
    | metadata | dict from layer name to the layer's marker in the file's metadata. If the scales in the file have  |
    |          | old names, such as "scale_weight", the file holds no markers; the dict then has the markers that   |
    |          | ComfyUI makes for these layers. None in all other files without markers in the metadata            |
    | faults   | a sentence for each marker, or metadata, that cannot be read                                       |
    """

    path: Path
    tensors: dict[str, Stored]
    markers: dict[str, Marker]
    metadata: dict[str, Marker] | None
    faults: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Content":
        """Reads the header and the markers of the file at `path`. Raises FileError for a file that is damaged."""
        tensors, metadata = read_header(path)
        markers: dict[str, Marker] = {}
        faults = []
        for name, stored in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == MARKER:
                marker = _marker_at(path, stored)
                if marker is None:
                    faults.append(f"{name} is not a JSON object")
                else:
                    markers[owner] = marker
        layers = None
        if METADATA not in metadata:
            tensors, layers = _renamed(tensors)
        else:
            layers = _layers_in(metadata[METADATA])
            if layers is None:
                faults.append(f"the metadata {METADATA} are not a JSON object with layers")
        return cls(path, tensors, markers, layers, tuple(faults))

    @property
    def effective(self) -> dict[str, Marker]:
        """A dict from layer name to the marker that ComfyUI obeys: the marker in the metadata, or if that is absent,
        the marker in the layer's tensor `comfy_quant`."""
        return self.markers | (self.metadata or {})

    @property
    def int8(self) -> dict[str, Marker]:
        """A dict from layer name to marker, with only the layers that ComfyUI loads as int8."""
        return self.of(INT8)

    def of(self, kind: str) -> dict[str, Marker]:
        """Returns a dict from layer name to marker, with only the layers that ComfyUI loads as layers of this `kind`,
        such as INT8."""
        return {name: marker for name, marker in self.effective.items() if marker.get("format") == kind}

    @property
    def attention(self) -> dict[str, Marker | None]:
        """A dict from the name of each module with quantized attention to its config; None for a config that cannot be
        read."""
        end = f".{ATTENTION}"
        stored = {name.removesuffix(end): stored for name, stored in self.tensors.items() if name.endswith(end)}
        return {name: _marker_at(self.path, entry) for name, entry in stored.items()}

    def tensor(self, layer: str, leaf: str) -> Stored | None:
        """Returns the tensor `leaf`, such as "weight", of a layer; None if the file has no such tensor."""
        return self.tensors.get(f"{layer}.{leaf}")

    @property
    def integer_weights(self) -> list[str]:
        """The names of the layers whose weights are stored in int8."""
        return self._weights("int8")

    @property
    def fp8_weights(self) -> list[str]:
        """The names of the layers whose weights are stored in float8_e4m3fn."""
        return self._weights(FP8)

    def _weights(self, dtype: str) -> list[str]:
        names = (name for name, stored in self.tensors.items() if stored.dtype == dtype)
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    @property
    def names(self) -> set[str]:
        """The names of all tensors, without the prefix, such as "model.diffusion_model.", that distinguishes a
        diffusion model from other models in the same file."""
        for prefix in PREFIXES:
            if any(name.startswith(prefix) for name in self.tensors):
                return {name.removeprefix(prefix) for name in self.tensors}
        return set(self.tensors)


def _renamed(tensors: dict[str, Stored]) -> tuple[dict[str, Stored], dict[str, Marker] | None]:
    """Returns `tensors` with the scales renamed from old names, such as "scale_weight", to present ones; and a dict
    from the name of each layer with such a weight scale to the marker that ComfyUI makes for it. A file has old names
    if it has a tensor "scaled_fp8"; without one, returns `tensors` as they are, and None. If "scaled_fp8" has two
    elements, the inputs of all layers stay float."""
    flag = next((stored for name, stored in tensors.items() if name.rpartition(".")[2] == SCALED), None)
    if flag is None:
        return tensors, None
    marker = {"format": FP8} | ({FULL_PRECISION: True} if flag.shape == (2,) else {})
    layers, renamed = {}, {}
    for name, stored in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "scale_weight":
            layers[owner] = marker
        renamed[f"{owner}.{OLD_NAMES[leaf]}" if leaf in OLD_NAMES else name] = stored
    return renamed, layers


def _marker_at(path: Path, stored: Stored) -> Marker | None:
    """Reads a marker or a config, a JSON object in bytes, from the tensor `stored` in the file at `path`. Returns None
    if the tensor holds no JSON object."""
    if stored.dtype != "uint8" or stored.bytes > _MARKER_LIMIT:
        return None
    try:
        marker = json.loads(read_array(path, stored).tobytes())
    except (ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) else None


def _layers_in(text: str) -> dict[str, Marker] | None:
    """Returns a dict from layer name to marker, read from `text`, the entry about quantization in a file's metadata.
    Returns None if `text` is not JSON, or not a JSON object with a dict "layers" of markers."""
    try:
        layers = json.loads(text)["layers"]
        return layers if all(isinstance(marker, dict) for marker in layers.values()) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def file_in(path: Path) -> Path | None:
    """Returns the path of a file in format `comfy`. If `path` is not a directory, that is `path` itself. In a directory
    it is a file with a name that Octavo writes, or else the first safetensors file with markers. Returns None if a
    directory holds neither."""
    if not path.is_dir():
        return path
    own = [path / name for name in FILES if (path / name).is_file()]
    others = (file for file in sorted(path.glob("*.safetensors")) if _has_markers(file))
    return own[0] if own else next(others, None)


def _has_markers(path: Path) -> bool:
    """Returns whether the file at `path` has markers, which say how a layer is quantized. Returns False for a file that
    is damaged."""
    try:
        tensors, metadata = read_header(path)
    except (OctavoError, OSError):
        return False
    return METADATA in metadata or any(name.rpartition(".")[2] in (MARKER, SCALED) for name in tensors)
