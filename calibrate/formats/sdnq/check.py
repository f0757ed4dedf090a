"""Checks whether diffusers with the library sdnq can load a directory in format `sdnq`. Also reports faults that change
the output of the model without an error from sdnq. The rules are in the module `rules`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from octavo.capture.errors import OctavoError

from ..diffusers.directory import CONFIG_FILE, Model, StoredTensor
from ..verdict import Verdict
from .rules import FLOAT_LAYERS, MATMUL, listed, transposed, words

CONSUMER = "SDNQ"
WEIGHT, SCALE = ".weight", ".scale"
_PARTS = ("weight", "scale", "bias")  # the tensors of an int8 layer


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether diffusers with sdnq can load `directory`, whose config.json has the quant_method
    "sdnq". Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Model.open(directory)))
    except OctavoError as error:
        return [Verdict(CONSUMER, "files", False, str(error))]


def _verdicts(model: Model) -> Iterator[Verdict]:
    config = model.quantization
    kind = config.get("weights_dtype", "int8")
    if kind != "int8":
        yield Verdict(CONSUMER, CONFIG_FILE, True, f"weights_dtype is {kind!r}; Octavo checks int8 only")
        return
    yield _settings(model)
    names = model.int8_layers
    misfits = (misfit for name in names if (misfit := _misfit(model, name)))
    fact = next(misfits, "")
    sound = f"{len(names)} int8 layers, laid out as {MATMUL} says" if names else "no layer is int8"
    yield Verdict(CONSUMER, "layers", bool(names) and not fact, fact or sound)
    if not fact and any(_wrong_scale(model.tensors[name + SCALE]) for name in names):
        yield Verdict(CONSUMER, "scales", False, "a scale is negative or not finite. Copy the checkpoint again")
    if kept := _converted_floats(model):
        fact = f"{kept} is float and not in {FLOAT_LAYERS}, so sdnq would compute with a scale that is not in the file"
        yield Verdict(CONSUMER, "float layers", False, f"{fact}. Add its name to the list")
    if surplus := _surplus(model, names):
        fact = f"sdnq ignores {surplus} without an error. Write the checkpoint without it, for example with {_AGAIN}"
        yield Verdict(CONSUMER, "further tensors", False, fact)


_AGAIN = "octavo calibrate --format sdnq"


def _settings(model: Model) -> Verdict:
    """Returns the verdict on the quantization_config. The verdict says which keys of quantization_config, such as
    `use_hadamard`, change what sdnq computes. It is negative only if `use_svd` is set and the tensors that this key
    needs are missing."""
    config = model.quantization
    stored = {name.rpartition(".")[2] for name in model.tensors}
    if config.get("use_svd") and "svd_up" not in stored:
        return Verdict(CONSUMER, CONFIG_FILE, False, f"use_svd is set, but svd_up is missing. Run {_AGAIN}")
    if config.get("use_hadamard"):
        fact = "use_hadamard is set: sdnq rotates the inputs, which is right only if the weights were rotated too"
        return Verdict(CONSUMER, CONFIG_FILE, True, fact)
    matmul = "integers are multiplied" if config.get(MATMUL) is True else "weights become float before they are used"
    return Verdict(CONSUMER, CONFIG_FILE, True, f"{MATMUL} is {config.get(MATMUL, False)!r}: {matmul}")


def _misfit(model: Model, name: str) -> str | None:
    """Returns the first fault of the int8 layer `name` in words, such as a missing scale, with advice; None if sdnq
    loads the layer correctly."""
    config, weight = model.quantization, model.tensors[name + WEIGHT].stored
    if listed(name + WEIGHT, words(config, FLOAT_LAYERS)):
        fact = f"{name}.weight is int8, but {FLOAT_LAYERS} has it: sdnq would take the integers for float weights"
        return f"{fact}. Remove it from the list"
    if name + SCALE not in model.tensors:
        return f"{name}.scale is missing: diffusers only warns, and the layer has no values. Run {_AGAIN}"
    scale = model.tensors[name + SCALE].stored
    if scale.dtype not in ("float32", "float16", "bfloat16"):
        return f"{name}.scale is {scale.dtype}, not float. Run {_AGAIN}"
    if len(weight.shape) != 2 or len(scale.shape) != 2:
        return None  # convolutions, and scales for groups of inputs
    outputs = scale.shape[0] * scale.shape[1]
    if outputs == 1:
        return None  # one scale for the whole weight
    inputs = weight.shape[0] * weight.shape[1] // max(outputs, 1)
    across = transposed(config, name, outputs, inputs)
    if (weight.shape, scale.shape) == (
        ((inputs, outputs), (1, outputs)) if across else ((outputs, inputs), (outputs, 1))
    ):
        return None
    needed = "(in, out) with a scale (1, out)" if across else "(out, in) with a scale (out, 1)"
    fact = f"{name}.weight is {list(weight.shape)} with a scale {list(scale.shape)}, but {MATMUL} and the lists"
    return f"{fact} of modules make sdnq read {needed}: square layers give noise without an error. Run {_AGAIN}"


def _wrong_scale(tensor: StoredTensor) -> bool:
    values = tensor.read().astype(np.float64)
    return not (bool(np.isfinite(values).all()) and bool((values >= 0).all()))


def _converted_floats(model: Model) -> str | None:
    """Returns the name of a float weight that sdnq would take for an int8 weight; None if there is none. sdnq does so
    with the weight of a linear layer that is not in the list `modules_to_not_convert`. A weight counts as that of a
    linear layer if it has two axes, and there is a bias beside it."""
    floats = words(model.quantization, FLOAT_LAYERS)
    for name, tensor in model.tensors.items():
        if name.endswith(WEIGHT) and tensor.stored.dtype != "int8" and len(tensor.stored.shape) == 2:
            biased = name.removesuffix(WEIGHT) + ".bias" in model.tensors
            if biased and not listed(name, floats):
                return name
    return None


def _surplus(model: Model, names: list[str]) -> str | None:
    """Returns the name of a tensor that belongs to one of the int8 layers `names`, but that sdnq would not load; None
    if there is no such tensor."""
    layers, config = set(names), model.quantization
    more = ("zero_point", "svd_up", "svd_down") if config.get("use_svd") else ("zero_point",)
    for key in model.tensors:
        owner, _, leaf = key.rpartition(".")
        if owner in layers and leaf not in (*_PARTS, *more):
            return key
    return None
