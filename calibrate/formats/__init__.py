"""Formats of checkpoints: a folder each, with a record of how the format is written, found, checked, described and
read.

TABLE is light, so that a command line can list formats before torch is loaded; `format_named` loads the record.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .record import Format


class Listed(NamedTuple):
    """The folder that holds the record of a format, and the kinds of models that the format is for."""

    folder: str
    models: tuple[str, ...]


DENOISER, CLASSIFIER = "denoiser", "classifier"
TABLE: dict[str, Listed] = {
    "ascend": Listed("ascend", (DENOISER, CLASSIFIER)),
    "diffusers": Listed("diffusers", (DENOISER,)),
    "torchao": Listed("torchao", (DENOISER,)),
    "onnx": Listed("onnx", (CLASSIFIER,)),
    "ascend-onnx": Listed("onnx", (CLASSIFIER,)),
}


def names_for(model: str) -> tuple[str, ...]:
    """The formats for a kind of model."""
    return tuple(name for name, listed in TABLE.items() if model in listed.models)


def format_named(name: str) -> "Format":
    """The record of the format of that name."""
    module = import_module(f".{TABLE[name].folder}.format", __name__)
    found: Format = next(each for each in module.FORMATS if each.name == name)
    return found
