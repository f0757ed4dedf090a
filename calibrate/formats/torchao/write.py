"""Writes the format `torchao`: a directory that diffusers loads with torchao 0.18 installed, and without Octavo.

The layout is that of torchao's `flatten_tensor_state_dict` (torchao.prototype.safetensors), `Int8Tensor` and
`Float8Tensor`: a weight X.weight becomes X._weight_qdata, X._weight_scale and so on, and the metadata of each file
describe every tensor by name. Writing needs no torchao. An int8 layer in torchao computes

y = (sum over k of x_q[k] * weight[n, k] - zero_point * sum over k of weight[n, k]) * input scale * weight scale + bias

Octavo's layer computes y = (sum over k of x_q[k] * weight[n, k] + quant_bias[n]) * deq[n], where quant_bias holds the
zero point's part, the bias and the bias correction. torchao computes the zero point's part itself, so only the bias is
written, as a float with the bias correction added. deq is the product of both scales, rounded for the device. The
weight scale of a static layer is written as deq / input scale, so that torchao multiplies by the same deq with which
calibration measured the accuracy, up to the rounding of float32. The smoothing multiplier of the input becomes
act_pre_scale.

A Float8Tensor (`float8`) has codes and a scale for each output channel. Its layer divides each token by max / 448 in
the dtype of the input, and adds the bias in float. It has no multiplier, so smoothing has to be folded.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned, dtype_name

from ...layers.install import names_of
from ...layers.modules import QuantizedLayer, QuantizedLinear
from ...layers.weights import check_finite_tensor
from ...smoothing.fold import output_offset
from ..corrections import has_bias_correction
from ..diffusers.write import NONE, SHARD, config_of, state, write_config, write_weights
from . import float8
from .check import NAMES, WEIGHT

_PLAIN = json.dumps({"_type": "Tensor"})
_PER_ROW: dict[str, Any] = {"_type": "PerRow", "_data": {"dim": -1}}
_PER_TENSOR: dict[str, Any] = {"_type": "PerTensor", "_data": {}}
# diffusers requires a config for quantizing, although it does not use the config when it loads a quantized model
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "torchao",
    "quant_type": {
        "default": {
            "_type": "Int8DynamicActivationInt8WeightConfig",
            "_version": 2,
            "_data": {
                "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
                "weight_only_decode": False,
                "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
                "set_inductor_config": True,
                "reduce_range": False,
            },
        }
    },
    "modules_to_not_convert": None,
}


class RankedLayer(NamedTuple):
    """An integer layer, and `rank`, the number of axes of its input. torchao needs the scale of a static input as a
    tensor with this number of axes."""

    layer: QuantizedLayer
    rank: int


def write_torchao(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    axes: Mapping[str, int] | None = None,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into an
    existing directory. `modes` has the permissions of new files.

    `axes` is a dict from layer name to the number of axes of the layer's input, needed for static layers. `parameters`
    are the float parameters with smoothing factors folded in, a dict from name to a function that returns the new
    value. Weights above `shard` bytes are split into several files. Raises UsageError for a layer that the format
    cannot hold and for a model that is not a diffusers model, NumbersError for a number that is not finite.
    """
    config, axes = config_of(model), axes or {}
    for name, layer in layers.items():
        if refusal := refusal_of(layer, axes.get(name)):
            raise UsageError(f"format torchao: {name} {refusal}")
    ranked = {name: RankedLayer(layer, axes.get(name, 0)) for name, layer in layers.items()}
    named = {name: ranked[names[0]] for names in names_of(model).values() if names[0] in ranked for name in names}
    tensors, kinds = dict[str, Planned](), dict[str, str]()
    for name, tensor in state(model, {}, parameters):
        owner, _, leaf = name.rpartition(".")
        if owner not in named:
            tensors[name], kinds[name] = tensor, _PLAIN
        elif leaf == "weight":
            ranked_layer = named[owner]
            tensors |= {f"{owner}{WEIGHT}{key}": Planned.of(value) for key, value in parts(ranked_layer)}
            kinds[name] = json.dumps(description(ranked_layer.layer))
            if ranked_layer.layer.bias is not None:
                key = f"{owner}.bias"
                tensors[key], kinds[key] = Planned.of(bias_of(key, ranked_layer.layer)), _PLAIN
    write_config(directory, config | {"quantization_config": _quantization_config(layers.values())}, modes)
    write_weights(directory, tensors, kinds | {NAMES: json.dumps(list(kinds))}, modes, shard)


def _quantization_config(layers: Iterable[QuantizedLayer]) -> dict[str, Any]:
    """Returns the quantization_config of config.json: the one for FP8 weights if one of `layers` has FP8 codes,
    otherwise the one for int8 weights."""
    fp8 = any(not layer.integer for layer in layers)
    return QUANTIZATION_CONFIG | ({"quant_type": {"default": float8.CONFIG}} if fp8 else {})


def refusal_of(layer: QuantizedLayer, rank: int | None) -> str | None:
    """Returns the reason why the format torchao cannot hold a layer, and what the user can do; None if it can hold the
    layer.

    `rank` is the number of axes of the layer's input; None or 0 if it is unknown or changes between calls,
    in which case the format cannot hold a static layer.
    """
    if not isinstance(layer, QuantizedLinear):
        return "is a convolution, which torchao does not quantize. Keep the layer float."
    if layer.input_type.by_level:
        return "has a range for each noise level, which torchao does not support. Use --activations static or dynamic."
    if layer.calibrated and not rank:
        return "has inputs whose number of axes is unknown or changes, not fixed. Use --activations dynamic."
    if layer.made_bias or (layer.bias is None and has_bias_correction(layer)):
        return "has no bias in the float model to add the bias correction to. Use --no-bias-correction."
    return None


def parts(ranked_layer: RankedLayer) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for each tensor that torchao's Int8Tensor or Float8Tensor stores for the weight of
    `ranked_layer`, a layer together with the number of axes of its input. Among the tensors are the input's scale and
    smoothing multiplier. The names are those in torchao, such as "scale"."""
    layer, axes = ranked_layer.layer, [1] * ranked_layer.rank
    yield "qdata", layer.weight.detach()
    yield "scale", _weight_scale(layer).view(-1, 1)
    if not layer.integer:
        return
    yield "zero_point", torch.zeros(len(layer.weight), 1, dtype=torch.int8)
    if layer.calibrated:
        yield "act_quant_scale", layer.input_scale.view(axes)
        yield "act_quant_zero_point", layer.input_zero_point.to(torch.int8).view(axes)
    if layer.mul_scale is not None:
        yield "act_pre_scale", layer.mul_scale


def _weight_scale(layer: QuantizedLayer) -> Tensor:
    """Returns the scales of the weight's output channels, (out,). For a static layer they are deq / input scale, where
    deq is the rounded product of input scale and weight scale.

    A channel whose weights are all zero keeps the weight scale of the layer, because its deq is not that product; it
    was chosen for the channel's bias alone.
    """
    if not layer.calibrated:
        return layer.weight_scale
    scale = (layer.deq.double() / layer.input_scale.double()).to(torch.float32)
    return torch.where((layer.weight.flatten(1) == 0).all(1), layer.weight_scale, scale)


def description(layer: QuantizedLayer) -> dict[str, Any]:
    """Returns the metadata that describe a layer's weight, with the keys of torchao's Int8Tensor or Float8Tensor in
    torchao's order."""
    if not layer.integer:
        return float8.description(layer)
    mapping = "ASYMMETRIC" if layer.calibrated else "SYMMETRIC"
    kwargs: dict[str, Any] = {
        "granularity": _PER_TENSOR if layer.calibrated else _PER_ROW,
        "mapping_type": {"_type": "MappingType", "_data": mapping},
        "reduce_range": False,
    }
    optional = ["zero_point"] + ["act_quant_scale", "act_quant_zero_point"] * layer.calibrated
    optional += ["act_pre_scale"] * (layer.mul_scale is not None)
    return {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": None if layer.weight_only else {"_type": "QuantizeTensorToInt8Kwargs", "_data": kwargs},
            "reduce_range": False,
            "block_size": [1, layer.weight.shape[1]],
            "dtype": {"_type": "torch.dtype", "_data": dtype_name(layer.dtype)},
        },
        "_tensor_data_names": [*optional, "qdata", "scale"],
    }


def bias_of(name: str, layer: QuantizedLayer) -> Tensor:
    """Returns the bias of a layer in its float dtype, plus the bias correction that the layer's quant_bias includes, if
    any.

    Raises NumbersError for a bias that is not finite; the message begins with `name`.
    """
    assert layer.bias is not None
    bias = layer.bias.detach()
    if has_bias_correction(layer):
        bias = output_offset(layer.numbers).to(bias.dtype)
    check_finite_tensor(name, bias)
    return bias
