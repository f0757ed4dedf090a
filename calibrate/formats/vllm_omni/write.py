"""Writes the format `vllm-omni`: a transformer directory that vLLM-Omni loads with its quantization method `int8`.

An int8 layer X has X.weight in int8, X.weight_scale in float32 (out, 1), and X.bias if its float layer has one. All
other tensors are float. The key `ignored_layers` of the quantization_config lists the float layers that vLLM-Omni would
otherwise take for int8, by their names in diffusers and in vLLM-Omni. An integer layer that vLLM-Omni can only hold as
float is written in float: its weight is codes times scale, in the dtype of the model.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer
from ...layers.schemes import DYNAMIC
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, float_parts, linear_tensors
from ..native import NativeModel, linears_in
from .models import MODELS
from .rules import DYNAMIC_WORD, IGNORED, METHOD, SCHEME, SERIALIZED, refusal


def write_vllm_omni(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into an
    existing directory. `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Weights of more than `shard` bytes are split into several files with an index. Raises UsageError for
    a model that vLLM-Omni cannot load with int8 layers and for a layer that the format cannot hold, NumbersError for a
    number to be written that is not finite.
    """
    config = config_of(model)
    kind = type(model).__name__
    if reason := refusal(kind, config):
        raise UsageError(f"format vllm-omni: {reason}")
    check_linears("vllm-omni", layers, (DYNAMIC,), "Use --activations dynamic.")
    native, named = MODELS[kind], all_names(layers, model)
    linears = linears_in(model)
    integers = native.written(named, linears)
    tensors = linear_tensors(layers, model, parameters, partial(_parts, integers))
    quantization = {
        "quant_method": METHOD,
        SCHEME: DYNAMIC_WORD,
        SERIALIZED: True,
        IGNORED: _ignored(native, linears, integers),
    }
    write_config(directory, config | {"quantization_config": quantization}, modes)
    write_weights(directory, tensors, {}, modes, shard)


def _parts(integers: set[str], name: str, layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    if name not in integers:
        yield from float_parts(layer)
        return
    yield "weight", Planned.of(layer.weight.detach())
    yield "weight_scale", Planned.of(layer.weight_scale.to(torch.float32).view(-1, 1))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)


def _ignored(native: NativeModel, linears: list[str], integers: set[str]) -> list[Any]:
    """Returns the names of the float layers among `linears` that vLLM-Omni could hold as int8, each by its name in
    diffusers and by its name in vLLM-Omni. `integers` are the names of the layers that are written as int8."""
    floats = [name for name in linears if native.holds(name) and name not in integers]
    return sorted({*floats, *map(native.name, floats)})
