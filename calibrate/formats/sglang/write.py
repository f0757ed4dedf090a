"""Writes the format `sglang`: a transformer directory that SGLang-diffusion loads on an Ascend NPU.

The tensors and the description, a JSON file that gives the scheme of each tensor, are those of the format `ascend` for
a model in bfloat16. If SGLang has another name for a layer than diffusers, the description gives the layer's scheme, or
FLOAT, under both names. An 8-bit layer that SGLang can only hold as float is written in float: its weight is codes
times scale. So is a W8A8_MXFP8 layer whose number of inputs 64 does not divide. The weight files have diffusers' names.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes, create
from octavo.capture.tensors import Planned

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer
from ...layers.schemes import DYNAMIC, MXFP8, STATIC
from ..ascend.write import tensors_and_description
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, float_parts
from ..native import NativeModel, linears_in
from .models import MODELS
from .rules import DESCRIPTION_FILE, FLOAT, fits, refusal


def write_sglang(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json, the description (the JSON file that gives the scheme of each tensor) and the weights of
    `model`, with the integer `layers` in place of its float layers, into an existing directory. `modes` has the
    permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Weights of more than `shard` bytes are split into several files with an index. Raises UsageError for
    a model that SGLang cannot load with int8 layers and for a layer that the format cannot hold, NumbersError for a
    number to be written that is not finite.
    """
    config, kind = config_of(model), type(model).__name__
    if reason := refusal(kind, config):
        raise UsageError(f"format sglang: {reason}")
    check_linears("sglang", layers, (STATIC, DYNAMIC, MXFP8), "Use --activations static or dynamic.")
    for name, layer in layers.items():
        if layer.dtype != torch.bfloat16:
            fact = f"{name} was calibrated in {str(layer.dtype).removeprefix('torch.')}, and SGLang runs in bfloat16"
            raise UsageError(f"format sglang: {fact}. Use --dtype bfloat16.")
    tensors, description = _content(all_names(layers, model), model, MODELS[kind], parameters)
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_config(directory, config, modes)
    write_weights(directory, tensors, {}, modes, shard)
    with create(directory / DESCRIPTION_FILE, modes.data) as sink:
        sink.write(text.encode())


def _content(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    native: NativeModel,
    parameters: Mapping[str, Callable[[], Tensor]],
) -> tuple[dict[str, Planned], dict[str, str]]:
    """Returns two dicts: from tensor name to tensor to be written, and the description, from tensor name to scheme or
    "FLOAT". `layers` is a dict from name to integer layer; a layer that is used in several places is in it under each
    of its names. `native` says which layers SGLang can hold as integers, and what it calls them. `parameters` are the
    float parameters with smoothing factors folded in."""
    linears = linears_in(model)
    fitting = [name for name, layer in layers.items() if fits(layer.weight.shape[1], layer.scheme)]
    integers = native.written(fitting, linears)
    held = {name: layer for name, layer in layers.items() if name in integers}
    tensors, description = tensors_and_description(held, model, parameters=parameters)
    for name in set(layers) - integers:
        for key in [key for key in tensors if key.rpartition(".")[0] == name]:
            del tensors[key], description[key]
        parts = {f"{name}.{leaf}": planned for leaf, planned in float_parts(layers[name])}
        tensors, description = tensors | parts, description | dict.fromkeys(parts, FLOAT)
    for name in filter(native.holds, linears):
        description[f"{native.name(name)}.weight"] = description[f"{name}.weight"]
    return tensors, description
