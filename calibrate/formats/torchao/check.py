"""Checks whether diffusers with torchao can load a directory in format `torchao`: whether the metadata describe every
tensor, every described tensor is there, and the numbers of FP8 weights are as torchao needs them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.capture.errors import OctavoError

from ..diffusers.directory import CONFIG_FILE, Model
from ..e4m3 import is_nan
from ..verdict import TORCHAO, Verdict

WEIGHT = "._weight_"  # between the name of a layer and the name of a part of its weight, as torchao writes it
ZEROS = "tokens of zeros"  # subject of a verdict
_FLOAT8 = "Float8Tensor"
NAMES = "tensor_names"  # torchao's key in the metadata of a weight file


def check(directory: Path) -> list[Verdict]:
    """Returns one verdict on whether diffusers with torchao can load `directory`, whose config.json has the
    quant_method "torchao". Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Model.open(directory)))
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error))]


def _verdicts(model: Model) -> Iterator[Verdict]:
    """Yields the verdict on whether the metadata of the weight files describe every tensor, and every described tensor
    is there; and if so, and there are FP8 weights, the verdicts on their numbers. If config.json does not name torchao,
    yields only a negative verdict on that."""
    if model.quantization.get("quant_method") != "torchao":
        fact = "has no quantization_config for torchao, so that diffusers does not load the 8-bit codes as such"
        yield Verdict(TORCHAO, CONFIG_FILE, False, fact)
        return
    kinds: dict[str, dict[str, Any]] = {}
    described: set[str] = set()
    try:
        for name in json.loads(model.metadata[NAMES]):
            kind, (owner, _, _) = json.loads(model.metadata[name]), name.rpartition(".")
            kinds[owner if kind["_type"] != "Tensor" else name] = kind
            parts = [f"{owner}{WEIGHT}{part}" for part in kind.get("_tensor_data_names", [])]
            described |= set(parts or [name])
        counts = Counter(kind["_type"] for kind in kinds.values() if kind["_type"] != "Tensor") or {"Int8Tensor": 0}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        yield Verdict(TORCHAO, "metadata", False, f"do not describe the tensors ({type(error).__name__} {error})")
        return
    if misfits := sorted(described ^ set(model.tensors)):
        word = "is described but missing" if misfits[0] in described else "is not described"
        yield Verdict(TORCHAO, "tensors", False, f"{misfits[0]} {word}")
        return
    weights = " and ".join(f"{count} {kind}" for kind, count in counts.items())
    fact = f"{model.config.get('_class_name')} with {weights} weights, all described, for torchao 0.18"
    yield Verdict(TORCHAO, "tensors", True, fact)
    floats = {owner: kind for owner, kind in kinds.items() if kind["_type"] == _FLOAT8}
    if floats:
        faults = [fault for owner, kind in floats.items() for fault in _faults(model, owner, kind)]
        yield Verdict(TORCHAO, "FP8", not faults, faults[0] if faults else "codes and scales are as torchao needs them")
        yield _zeros(floats)


def _zeros(kinds: Mapping[str, dict[str, Any]]) -> Verdict:
    """Returns the verdict on whether tokens of zeros have finite outputs. torchao divides a token by its largest
    absolute value, or by `hp_value_lb` if the token's value is smaller. Without `hp_value_lb` it divides a token of
    zeros by zero. `kinds` has the description of each FP8 weight."""
    for owner, kind in kinds.items():
        data = kind.get("_data")
        inputs = data.get("act_quant_kwargs") if isinstance(data, dict) else None
        if isinstance(inputs, dict) and not (inputs.get("_data") or {}).get("hp_value_lb"):
            fact = f"{owner}.weight has no hp_value_lb: a token of zeros becomes NaN, unless a kernel of mslk quantizes"
            return Verdict(TORCHAO, ZEROS, False, fact)
    return Verdict(TORCHAO, ZEROS, True, "tokens of zeros stay zeros")


def _faults(model: Model, owner: str, kind: Mapping[str, Any]) -> Iterator[str]:
    """Yields in words what is wrong with the FP8 weight of the layer `owner`, which `kind` describes. torchao itself
    computes with wrong numbers without an error."""
    codes, scale = (model.tensors.get(f"{owner}{WEIGHT}{part}") for part in ("qdata", "scale"))
    data = kind.get("_data")
    if codes is None or scale is None or not isinstance(data, dict):
        yield f"{owner}.weight is not described by codes, scale and data"
        return
    shape = codes.stored.shape
    if codes.stored.dtype != "float8_e4m3fn" or len(shape) != 2:
        yield f"{owner}.weight has codes that are {codes.stored.dtype} {list(shape)}, not a float8_e4m3fn matrix"
        return
    block = data.get("block_size")
    wanted = {str([1, shape[1]]): (shape[0], 1), str(list(shape)): (1, 1)}.get(str(block))
    if wanted is None or scale.stored.shape != wanted or scale.stored.dtype != "float32":
        fact = f"is {scale.stored.dtype} {list(scale.stored.shape)}, which does not fit block_size {block}"
        yield f"the scale of {owner}.weight {fact}"
    elif not (np.isfinite(values := scale.read()) & (values > 0)).all():
        yield f"the scale of {owner}.weight is not positive and finite"
    if is_nan(codes.bits()).any():
        yield f"{owner}.weight has codes that are NaN"
    if data.get("act_quant_kwargs") is not None and data.get("mm_config") is None:
        yield f"{owner}.weight has act_quant_kwargs without mm_config, which torchao needs"
