"""The structure of a file in format `comfy`: names, keys and the marker of a layer. Needs no torch."""

from typing import Any

FILE = "diffusion_model_int8.safetensors"
MARKER = "comfy_quant"  # last part of the name of a layer's marker
METADATA = "_quantization_metadata"  # key of the file's metadata with all markers
VERSION = "1.0"  # version of the content of METADATA
INT8 = "int8_tensorwise"
GROUP = 256  # channels in a group of a rotation whose marker does not say the number


def marker_of(group: int | None) -> dict[str, Any]:
    """Returns the marker of an int8 layer. `group` is the number of channels in a group of its rotation; None if its
    input is not rotated."""
    return {"format": INT8} | ({} if group is None else {"convrot": True, "convrot_groupsize": group})
