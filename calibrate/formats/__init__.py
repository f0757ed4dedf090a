"""The formats of checkpoints. Each format has a folder here, whose module `format` has a record of how the format is
written, found, checked, described and read.

TABLE lists the formats without importing torch, for the command line. `format_named` returns the record of one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .record import Format


class FormatFolder(NamedTuple):
    """The folder with the record of a format, and the kinds of models (DENOISER, CLASSIFIER) that the format is for."""

    folder: str
    models: tuple[str, ...]


DENOISER, CLASSIFIER = "denoiser", "classifier"
TABLE: dict[str, FormatFolder] = {
    "ascend": FormatFolder("ascend", (DENOISER, CLASSIFIER)),
    "diffusers": FormatFolder("diffusers", (DENOISER,)),
    "torchao": FormatFolder("torchao", (DENOISER,)),
    "onnx": FormatFolder("onnx", (CLASSIFIER,)),
    "ascend-onnx": FormatFolder("onnx", (CLASSIFIER,)),
}


def names_for(model: str) -> tuple[str, ...]:
    """Returns the names of the formats for a kind of model, DENOISER or CLASSIFIER."""
    return tuple(name for name, entry in TABLE.items() if model in entry.models)


def format_named(name: str) -> "Format":
    """Returns the record of the format called `name`, importing its folder."""
    module = import_module(f".{TABLE[name].folder}.format", __name__)
    record: Format = next(record for record in module.FORMATS if record.name == name)
    return record
