"""The formats of checkpoints. Each format has its code in a folder here. The folder's module `format` defines a
`Format` object, which knows how to write, find, check, describe and read checkpoints in the format.

TABLE lists the formats without importing torch, for the command line. `format_named` returns the `Format` object of a
format.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .record import Format


class FormatFolder(NamedTuple):
    """Holds the name of the subfolder of this package that has a format's code, and the kinds of models that can be
    written in the format: DENOISER, CLASSIFIER or both."""

    folder: str
    models: tuple[str, ...]


DENOISER, CLASSIFIER = "denoiser", "classifier"
TABLE: dict[str, FormatFolder] = {
    "ascend": FormatFolder("ascend", (DENOISER, CLASSIFIER)),
    "diffusers": FormatFolder("diffusers", (DENOISER,)),
    "torchao": FormatFolder("torchao", (DENOISER,)),
    "comfy": FormatFolder("comfy", (DENOISER,)),
    "sglang": FormatFolder("sglang", (DENOISER,)),
    "sdnq": FormatFolder("sdnq", (DENOISER,)),
    "vllm-omni": FormatFolder("vllm_omni", (DENOISER,)),
    "modelopt": FormatFolder("modelopt", (DENOISER,)),
    "bfl": FormatFolder("bfl", (DENOISER,)),
    "onnx": FormatFolder("onnx", (CLASSIFIER,)),
    "ascend-onnx": FormatFolder("onnx", (CLASSIFIER,)),
}


def names_for(model: str) -> tuple[str, ...]:
    """Returns the names of the formats in which a model of the kind `model`, DENOISER or CLASSIFIER, can be written."""
    return tuple(name for name, entry in TABLE.items() if model in entry.models)


def format_named(name: str) -> "Format":
    """Returns the `Format` object of the format called `name`, a key of TABLE, importing the format's code."""
    module = import_module(f".{TABLE[name].folder}.format", __name__)
    record: Format = next(record for record in module.FORMATS if record.name == name)
    return record
