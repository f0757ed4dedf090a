"""Describes the integer layers of a model for `quantization_config`, an entry of the model's config.json. From this
description it builds integer layers without values, into which the stored tensors are then loaded."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.capture.errors import MisfitError
from octavo.capture.tensors import dtype_name

from ...layers.inputs import INPUTS, RULES
from ...layers.modules import QuantizedLayer, build
from ...layers.numbers import Numbers
from ...layers.schemes import ROTATIONS
from ...layers.transforms import Multiply, MultiplyRotate, Rotate, Transform
from ...plan import groups_of
from .structure import LayerKind, Structure


def structure_of(layers: Mapping[str, QuantizedLayer]) -> Structure:
    """Returns what quantization_config, an entry of config.json, holds about the integer `layers`: the dtype of their
    float tensors, such as biases, and the kind of each layer, such as its scheme and its number of timestep bins.

    `layers` is a dict from name to integer layer; a layer that is used in several places is in it under each of its
    names.
    """
    dtype = next((layer.dtype for layer in layers.values()), torch.float32)
    return Structure(dtype_name(dtype), {name: _kind(layer) for name, layer in layers.items()})


def _kind(layer: QuantizedLayer) -> LayerKind:
    bins = len(layer.input_scale) if layer.input_type.by_level else 0
    rotation = 0 if layer.rotation is None else Rotate(layer.rotation).size
    clamping = layer.input_scheme.clamping
    return LayerKind(layer.scheme, layer.mul_scale is not None, layer.made_bias, bins, rotation, clamping)


def empty_layer(structure: Structure, name: str, module: nn.Module) -> QuantizedLayer:
    """Returns the integer layer that replaces the float `module`, as `structure` describes the layer `name`. The
    tensors of the new layer are on the meta device, without values.

    Raises MisfitError if `module` is not an nn.Linear or nn.Conv2d.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or weight is None:
        fact = f"is a {type(module).__name__} in this model, no Linear or Conv2d"
        raise MisfitError(f"{name}: {fact}. Load the checkpoint with the class that its config.json names.")
    dtype, channels = getattr(torch, structure.dtype), weight.shape[1] * groups_of(module)
    return build(_empty(structure.kinds[name], tuple(weight.shape), channels, bias is not None, dtype), module)


def _empty(kind: LayerKind, shape: tuple[int, ...], channels: int, biased: bool, dtype: torch.dtype) -> Numbers:
    """Returns the `Numbers` (weight codes, scales and so on) of an integer layer of this `kind` with a weight of this
    `shape` and `channels` input channels, as tensors without values on the meta device. `biased` says whether the float
    layer has a bias; `dtype` is the dtype of the float layer."""
    with torch.device("meta"):
        outputs, leading = shape[0], (kind.bins,) if kind.bins else ()
        tensors: dict[str, Tensor | None] = {
            "input_scale": torch.empty(leading), "input_zero_point": torch.empty(leading, dtype=torch.int32),
            "edges": torch.empty(max(kind.bins - 1, 0)),
        }  # fmt: skip
        input = INPUTS[kind.scheme].of(tensors, replace(RULES[kind.scheme], clamping=kind.clamping))
        block = input.scheme.block
        scale = torch.empty(outputs) if block is None else torch.empty(outputs, shape[1] // block, dtype=torch.uint8)
        return Numbers(
            torch.empty(shape, dtype=input.weights.element.dtype), scale,
            torch.empty(outputs, dtype=dtype) if biased or kind.made_bias else None,
            input, dtype, _empty_transform(kind, channels, dtype),
            torch.empty(*leading, outputs) if input.integer_bias else None,
            torch.empty(*leading, outputs, dtype=torch.int32) if input.integer_bias else None, kind.made_bias,
        )  # fmt: skip


def _empty_transform(kind: LayerKind, channels: int, dtype: torch.dtype) -> Transform | None:
    multiply = Multiply(torch.empty(channels, dtype=dtype))
    if not kind.rotation:
        return multiply if kind.multiplied else None
    rotate = Rotate(torch.empty(ROTATIONS[kind.rotation], dtype=torch.int32))
    return MultiplyRotate(multiply, rotate) if kind.multiplied else rotate
