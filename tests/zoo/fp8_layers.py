"""FP8 and MXFP8 layers, built directly."""

from collections.abc import Sequence

import torch
from torch import nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import DynamicInput, FloatInput, Input, StaticInput
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.layers.scheme import FP8, MXFP8, Element, QParams, Scheme
from octavo.calibrate.layers.weights import round_to_nearest

INPUT_SCALE = 0.0117  # covers inputs up to 5.2, and is no power of two


def _rule(element: Element, per_tensor: bool = False) -> Scheme:
    return Scheme(element=element, per_tensor=per_tensor)


def input_for(scheme: str, input_scale: float = INPUT_SCALE, per_tensor: bool = True) -> Input:
    """Returns the way in which inputs of a layer with this `scheme` become codes. `input_scale` is that of a static
    layer; with `per_tensor`, its weight has one scale."""
    qparams = QParams(torch.tensor(input_scale), torch.tensor(0, dtype=torch.int32))
    inputs: dict[str, Input] = {
        "W8A8_FP8": StaticInput(qparams, scheme=_rule(FP8, per_tensor)),
        "W8A8_FP8_DYNAMIC": DynamicInput(scheme=_rule(FP8)),
        "W8A16_FP8": FloatInput(scheme=_rule(FP8)),
        "W8A8_MXFP8": DynamicInput(scheme=_rule(MXFP8)),
        "W8A16_MXFP8": FloatInput(scheme=_rule(MXFP8)),
    }
    return inputs[scheme]


def fp8_layer(linear: nn.Linear, scheme: str, input_scale: float = INPUT_SCALE, **options: bool) -> QuantizedLinear:
    """Returns the layer of this `scheme` for `linear`, its weights rounded to nearest."""
    (layer,) = alike([linear], scheme, input_scale, **options)
    return layer


def alike(
    linears: Sequence[nn.Linear], scheme: str, input_scale: float = INPUT_SCALE, **options: bool
) -> list[QuantizedLinear]:
    """Returns the layers of this `scheme` for `linears`, with one weight scale for all of them where a weight has one
    scale: the weights are rounded as the rows of one matrix."""
    input = input_for(scheme, input_scale, **options)
    rounded = round_to_nearest(torch.cat([linear.weight for linear in linears]), scheme=input.weights)
    assert rounded is not None
    sizes = [linear.out_features for linear in linears]
    layers = []
    for linear, weight, scale in zip(linears, *(tensor.split(sizes) for tensor in rounded), strict=True):
        part = rounded._replace(weight=weight.clone(), scale=scale.clone())
        numbers = numbers_of(part, linear.bias, input, linear.weight.dtype)
        assert not isinstance(numbers, str)
        layers.append(QuantizedLinear(numbers))
    return layers


def fp8_layers(
    module: nn.Module,
    scheme: str,
    groups: Sequence[Sequence[str]] = (),
    input_scale: float = INPUT_SCALE,
    keep: Sequence[str] = (),
) -> dict[str, QuantizedLinear]:
    """Returns layers of this `scheme` for the linear layers of `module`, by name, except for those with one of the
    words `keep` in their name, and for MXFP8 those whose inputs are not a multiple of 32 channels. The layers of each
    of `groups` have one weight scale, and are left out if one of them is."""  # fmt: skip
    linears = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and not any(word in name for word in keep)
        and not ("MXFP8" in scheme and layer.in_features % 32)
    }
    parted = {name for group in groups if not linears.keys() >= set(group) for name in group}
    joined = [group for group in groups if linears.keys() >= set(group)]
    single = [[name] for name in linears if not any(name in group for group in groups)]
    layers = {
        name: layer
        for group in (*joined, *single)
        for name, layer in zip(group, alike([linears[name] for name in group], scheme, input_scale), strict=True)
    }
    return {name: layers[name] for name in linears if name not in parted}
