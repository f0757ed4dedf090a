"""Writes the format `vllm-omni`: a transformer directory that vLLM-Omni loads with its quantization method `int8` or
`mxfp8`.

An int8 layer X has X.weight in int8 and X.weight_scale in float32 (out, 1). An MXFP8 layer X has X.weight in
float8_e4m3fn and X.weight_scale in uint8 (out, in / 32), the exponents of powers of two plus 127. Both have X.bias if
the float layer has one. All other tensors are float. The key `ignored_layers` of the quantization_config lists the
float layers that vLLM-Omni would otherwise take for 8-bit layers, by their names in diffusers and in vLLM-Omni. An
8-bit layer that vLLM-Omni can only hold as float is written in float: its weight is codes times scale, in the dtype of
the model.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, float_parts, linear_tensors
from ..native import NativeModel, linears_in
from .models import MODELS
from .rules import ACTIVATIONS, BY_SCHEME, DYNAMIC_WORD, IGNORED, Method, refusal


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
    a model that vLLM-Omni cannot load with 8-bit layers, for a layer that the format cannot hold, and for layers of
    several schemes; NumbersError for a number to be written that is not finite.
    """
    config = config_of(model)
    kind = type(model).__name__
    if reason := refusal(kind, config):
        raise UsageError(f"format vllm-omni: {reason}")
    check_linears("vllm-omni", layers, BY_SCHEME, "Use --activations dynamic.")
    method = _method(layers)
    native, named = MODELS[kind], all_names(layers, model)
    linears = linears_in(model)
    integers = native.written(named, linears)
    tensors = linear_tensors(layers, model, parameters, partial(_parts, method, integers))
    quantization = {
        "quant_method": method.name, method.serialized: True, IGNORED: _ignored(native, linears, integers)
    }  # fmt: skip
    if ACTIVATIONS in method.keys:
        quantization[ACTIVATIONS] = DYNAMIC_WORD
    write_config(directory, config | {"quantization_config": quantization}, modes)
    write_weights(directory, tensors, {}, modes, shard)


def _method(layers: Mapping[str, QuantizedLayer]) -> Method:
    """Returns the method of vLLM-Omni for `layers`. Raises UsageError if they would need two."""
    schemes = sorted({layer.scheme for layer in layers.values()}) or list(BY_SCHEME)[:1]
    if len(schemes) > 1:
        fact = f"cannot hold layers of {' and '.join(schemes)} together"
        raise UsageError(f"format vllm-omni: {fact}. Calibrate all layers with one --element.")
    return BY_SCHEME[schemes[0]]


def _parts(method: Method, integers: set[str], name: str, layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    if name not in integers:
        yield from float_parts(layer)
        return
    yield "weight", Planned.of(layer.weight.detach())
    yield "weight_scale", Planned.of(layer.weight_scale.view(method.scale_shape(*layer.weight.shape)))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)


def _ignored(native: NativeModel, linears: list[str], integers: set[str]) -> list[Any]:
    """Returns the names of the float layers among `linears` that vLLM-Omni could hold in 8 bits, each by its name in
    diffusers and by its name in vLLM-Omni. `integers` are the names of the layers that are written in 8 bits."""
    floats = [name for name in linears if native.holds(name) and name not in integers]
    return sorted({*floats, *map(native.name, floats)})
