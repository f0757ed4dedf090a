"""Writes the format `torchao`: a directory that diffusers loads with torchao 0.18 installed, and without Octavo.

The layout was read from torchao's `flatten_tensor_state_dict` (torchao.prototype.safetensors) and `Int8Tensor`: a
weight X.weight becomes X._weight_qdata, X._weight_scale and so on, and the metadata of each file describe every tensor
by name. Writing needs no torchao.

y = (sum over k of x_q[k] * weight[n, k] - zero_point * sum over k of weight[n, k]) * input scale * weight scale + bias

So the bias includes the correction that is in quant_bias, and the multiplier of an input becomes act_pre_scale. The
scale of the weight of a static layer is deq / input scale, so that its product with the input scale is the deq that was
measured, up to the rounding of float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.install import names_of
from ...layers.modules import QuantizedLayer, QuantizedLinear
from ...layers.weights import check_finite_tensor
from ...smoothing.fold import added
from ..corrections import corrected
from ..diffusers.write import NONE, SHARD, config_of, state, write_config, write_weights
from .check import NAMES, WEIGHT

_PLAIN = json.dumps({"_type": "Tensor"})
_PER_ROW: dict[str, Any] = {"_type": "PerRow", "_data": {"dim": -1}}
_PER_TENSOR: dict[str, Any] = {"_type": "PerTensor", "_data": {}}
# diffusers demands a config to quantize with, and does not use it for loading
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


class Form(NamedTuple):
    """A layer, and the number of axes of its input, which torchao demands of a static input scale too."""

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
    """Writes config and weights into an existing directory. `axes`: the number of axes of each layer's input.

    Raises UsageError for layers without a form in torchao, NumbersError when a number that would be written is not
    finite.
    """
    config = config_of(model)
    axes = axes or {}
    for name, layer in layers.items():
        if refusal := unfit(layer, axes.get(name)):
            raise UsageError(f"format torchao: {name} {refusal}")
    forms = {name: Form(layer, axes.get(name, 0)) for name, layer in layers.items()}
    named = {name: forms[each[0]] for each in names_of(model).values() if each[0] in forms for name in each}
    tensors: dict[str, Planned] = {}
    kinds: dict[str, str] = {}
    for name, tensor in state(model, {}, parameters):
        owner, _, leaf = name.rpartition(".")
        if owner not in named:
            tensors[name], kinds[name] = tensor, _PLAIN
        elif leaf == "weight":
            form = named[owner]
            tensors |= {f"{owner}{WEIGHT}{key}": Planned.of(value) for key, value in parts(form)}
            kinds[name] = json.dumps(description(form.layer))
            if form.layer.bias is not None:
                key = f"{owner}.bias"
                tensors[key], kinds[key] = Planned.of(bias_of(key, form.layer)), _PLAIN
    write_config(directory, config | {"quantization_config": QUANTIZATION_CONFIG}, modes)
    write_weights(directory, tensors, kinds | {NAMES: json.dumps(list(kinds))}, modes, shard)


def unfit(layer: QuantizedLayer, rank: int | None) -> str | None:
    """The reason why a layer has no form in torchao, and what to do; None for a layer that has one."""
    if not isinstance(layer, QuantizedLinear):
        return "is a convolution, which torchao does not quantize. Keep it float."
    if layer.input_type.by_level:
        return "has a range for each noise level, which torchao has not. Use --activations static or dynamic."
    if layer.calibrated and not rank:
        return "has inputs of unknown or changing rank, which torchao needs to know. Use --activations dynamic."
    if layer.made_bias or (layer.bias is None and corrected(layer)):
        return "has no bias to carry its correction. Use --no-bias-correction."
    return None


def parts(form: Form) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an Int8Tensor by torchao's names."""
    layer, axes = form.layer, [1] * form.rank
    yield "qdata", layer.weight.detach()
    yield "scale", _weight_scale(layer).view(-1, 1)
    yield "zero_point", torch.zeros(len(layer.weight), 1, dtype=torch.int8)
    if layer.calibrated:
        yield "act_quant_scale", layer.input_scale.view(axes)
        yield "act_quant_zero_point", layer.input_zero_point.to(torch.int8).view(axes)
    if layer.mul_scale is not None:
        yield "act_pre_scale", layer.mul_scale


def _weight_scale(layer: QuantizedLayer) -> Tensor:
    """The scales of the weight's channels; the deq of a channel of zeros, which scales its bias, is no such scale."""
    if not layer.calibrated:
        return layer.weight_scale
    scale = (layer.deq.double() / layer.input_scale.double()).to(torch.float32)
    return torch.where((layer.weight.flatten(1) == 0).all(1), layer.weight_scale, scale)


def description(layer: QuantizedLayer) -> dict[str, Any]:
    """The metadata of a weight, in torchao's own order."""
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
            "dtype": {"_type": "torch.dtype", "_data": str(layer.dtype).removeprefix("torch.")},
        },
        "_tensor_data_names": [*optional, "qdata", "scale"],
    }


def bias_of(name: str, layer: QuantizedLayer) -> Tensor:
    """The bias, with the correction that quant_bias carries."""
    assert layer.bias is not None
    bias = layer.bias.detach()
    if corrected(layer):
        bias = added(layer.numbers).to(bias.dtype)
    check_finite_tensor(name, bias)
    return bias
