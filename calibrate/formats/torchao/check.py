"""Checks whether diffusers with torchao can load a directory in format `torchao`: whether the metadata describe every
tensor, and every described tensor is there."""

import json
from pathlib import Path

from octavo.capture.errors import OctavoError

from ..diffusers.directory import Model
from ..verdict import TORCHAO, Verdict

WEIGHT = "._weight_"  # between the name of a layer and the name of a part of its weight, as torchao writes it
NAMES = "tensor_names"  # torchao's key in the metadata of a weight file


def check(directory: Path) -> list[Verdict]:
    """Returns one verdict on whether diffusers with torchao can load `directory`, whose config.json has the
    quant_method "torchao". Files that cannot be read give a negative verdict, not an error."""
    try:
        return [_described(Model.open(directory))]
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error))]


def _described(model: Model) -> Verdict:
    """Returns the verdict on whether the metadata of the weight files describe every tensor, and every described tensor
    is there."""
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
    misfits = sorted(described ^ set(model.tensors))
    if misfits:
        word = "is described but missing" if misfits[0] in described else "is not described"
        return Verdict(TORCHAO, "tensors", False, f"{misfits[0]} {word}")
    fact = f"{model.config.get('_class_name')} with {integers} Int8Tensor weights, all described, for torchao 0.18"
    return Verdict(TORCHAO, "tensors", True, fact)
