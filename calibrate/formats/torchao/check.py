"""Checks whether diffusers with torchao can load a directory: every tensor is described and present."""

import json
from pathlib import Path

from octavo.capture.errors import OctavoError

from ..diffusers.directory import Model
from ..verdict import TORCHAO, Verdict

WEIGHT = "._weight_"  # between the name of a layer and the name of a part of its weight, as torchao writes it
NAMES = "tensor_names"  # torchao's key in the metadata of a weight file


def check(directory: Path) -> list[Verdict]:
    """The verdict on a directory with torchao's quant_method."""
    try:
        return [_described(Model.open(directory))]
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error))]


def _described(model: Model) -> Verdict:
    """The verdict on whether every tensor is described, and every described tensor present."""
    try:
        names = json.loads(model.metadata[NAMES])
        described, integers = set(), 0
        for name in names:
            kind, (owner, _, _) = json.loads(model.metadata[name]), name.rpartition(".")
            integers += kind["_type"] == "Int8Tensor"
            parts = [f"{owner}{WEIGHT}{part}" for part in kind.get("_tensor_data_names", [])]
            described |= set(parts or [name])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return Verdict(TORCHAO, "metadata", False, f"do not describe the tensors ({type(error).__name__} {error})")
    odd = sorted(described ^ set(model.tensors))
    if odd:
        word = "is described and missing" if odd[0] in described else "is not described"
        return Verdict(TORCHAO, "tensors", False, f"{odd[0]} {word}")
    fact = f"{model.config.get('_class_name')}, {integers} Int8Tensor weights, all described; torchao 0.18"
    return Verdict(TORCHAO, "tensors", True, fact)
