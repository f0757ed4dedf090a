"""The structure of a file in format `comfy`: names, keys, the marker of a layer, and what a file contains. Needs no
torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.arrays import read_array, read_header
from octavo.capture.errors import OctavoError
from octavo.capture.store.headers import Stored

FILE = "diffusion_model_int8.safetensors"
MARKER = "comfy_quant"  # last part of the name of a layer's marker
METADATA = "_quantization_metadata"  # key of the file's metadata with all markers
VERSION = "1.0"  # version of the content of METADATA
INT8 = "int8_tensorwise"
GROUP = 256  # channels in a group of a rotation whose marker does not say the number
PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.")  # before all names of files with more parts
_MARKER_LIMIT = 1 << 16  # bytes; no marker is longer

Marker = dict[str, Any]


def marker_of(group: int | None) -> Marker:
    """Returns the marker of an int8 layer. `group` is the number of channels in a group of its rotation; None if its
    input is not rotated."""
    return {"format": INT8} | ({} if group is None else {"convrot": True, "convrot_groupsize": group})


def rotation_of(marker: Marker) -> Any:
    """Returns the number of channels in a group by which ComfyUI would rotate the input of a layer with this `marker`,
    as it is written there; None if it would not rotate the input."""
    params = marker.get("params")
    both = (params if isinstance(params, dict) else {}) | marker
    return both.get("convrot_groupsize", GROUP) if both.get("convrot") else None


class Content(NamedTuple):
    """The contents of a safetensors file that ComfyUI's quantization depends on.

    | field    | meaning                                                                                            |
    |----------|----------------------------------------------------------------------------------------------------|
    | path     | path of the file                                                                                   |
    | tensors  | dtype, shape and place of each tensor, by name                                                     |
    | markers  | dict from layer name to the marker in the layer's tensor `comfy_quant`                             |
    | metadata | dict from layer name to the marker in the file's metadata; None if the metadata have none          |
    | faults   | markers and metadata that cannot be read, in words                                                 |
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
        if METADATA in metadata:
            layers = _layers_in(metadata[METADATA])
            if layers is None:
                faults.append(f"the metadata {METADATA} are not a JSON object with layers")
        return cls(path, tensors, markers, layers, tuple(faults))

    @property
    def effective(self) -> dict[str, Marker]:
        """The markers by which ComfyUI loads the layers: a marker in the metadata replaces that of the tensor."""
        return self.markers | (self.metadata or {})

    @property
    def int8(self) -> dict[str, Marker]:
        """The markers of the layers that ComfyUI loads as int8."""
        return {name: marker for name, marker in self.effective.items() if marker.get("format") == INT8}

    @property
    def integer_weights(self) -> list[str]:
        """The names of the layers whose weights are stored in int8."""
        names = (name for name, stored in self.tensors.items() if stored.dtype == "int8")
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    @property
    def names(self) -> set[str]:
        """The names of all tensors, without the prefix that files with more than a diffusion model have."""
        for prefix in PREFIXES:
            if any(name.startswith(prefix) for name in self.tensors):
                return {name.removeprefix(prefix) for name in self.tensors}
        return set(self.tensors)


def _marker_at(path: Path, stored: Stored) -> Marker | None:
    """Reads the marker that a tensor holds; None if it is not a JSON object."""
    if stored.dtype != "uint8" or stored.bytes > _MARKER_LIMIT:
        return None
    try:
        marker = json.loads(read_array(path, stored).tobytes())
    except (ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) else None


def _layers_in(text: str) -> dict[str, Marker] | None:
    """Returns the markers in the metadata `text`, by layer; None if the text has another form."""
    try:
        layers = json.loads(text)["layers"]
        return layers if all(isinstance(marker, dict) for marker in layers.values()) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def file_in(path: Path) -> Path | None:
    """Returns the file in format `comfy` at `path`: `path` itself if it is not a directory; in a directory the file
    that Octavo writes, or else the first safetensors file with markers. None if there is none."""
    if not path.is_dir():
        return path
    if (path / FILE).is_file():
        return path / FILE
    return next((file for file in sorted(path.glob("*.safetensors")) if _has_markers(file)), None)


def _has_markers(path: Path) -> bool:
    """Returns whether the file at `path` has markers of ComfyUI's quantization; False for a file that is damaged."""
    try:
        tensors, metadata = read_header(path)
    except (OctavoError, OSError):
        return False
    return METADATA in metadata or any(name.endswith(f".{MARKER}") for name in tensors)
