"""The graph for onnxruntime and OpenVINO: QuantizeLinear and DequantizeLinear around the operators of the float model.

Activations are int8 with a zero point, weights int8 with a scale for each output channel, biases int32. The scale of a
weight is deq / input_scale, so that its product with the input scale is the deq that was evaluated. A Conv pads with
the zero point, which stands for 0.0. A W8A16 layer has its weight dequantized, and a float bias.

QuantizeLinear is saturate(round(x / scale) + zero_point); the evaluated layers round after the zero point is added. So
a value halfway between two codes, or so near that its sum with the zero point rounds to a half, may get a code that is
off by one. No code is off by more, and with a zero point of 0 none is.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from octavo.capture.errors import NumbersError, UsageError

from ...layers.modules import QuantizedConv2d, QuantizedLayer
from .graph_builder import Builder, Use, convolving, expanded, int32_bias

if TYPE_CHECKING:
    from onnx import ModelProto

_SCHEMES = ("W8A8", "W8A16")
_SMALLEST = torch.finfo(torch.float32).smallest_normal


def qdq(traced: "ModelProto", layers: Mapping[str, QuantizedLayer]) -> "ModelProto":
    """Makes the graph. Raises UsageError for a layer whose scheme has no form in it, NumbersError for scales outside
    float32.
    """
    for name, layer in layers.items():
        if layer.scheme not in _SCHEMES:
            raise UsageError(f"{name}: {layer.scheme} has no form in onnx. Calibrate with static activations.")
    return expanded(traced, layers, _expand)


def _expand(builder: Builder, use: Use) -> None:
    layer, name = use.layer, use.name
    if layer.weight_only:
        x, scale, bias = use.x, layer.weight_scale, None
        if layer.bias is not None:
            bias = builder.tensor(f"{name}.bias", layer.bias.float())
    else:
        x, scale, bias = _input(builder, use), _weight_scale(use), _bias(builder, use)
    if isinstance(layer, QuantizedConv2d):
        weight = _weight(builder, use, scale, 0)
        builder.node("Conv", [x, weight, *([bias] if bias else [])], use.y, **convolving(layer))
    elif use.rank == 2:
        weight = _weight(builder, use, scale, 0)
        builder.node("Gemm", [x, weight, *([bias] if bias else [])], use.y, transB=1)
    else:
        weight = _weight(builder, use, scale, 1)
        product = use.y if bias is None else builder.free(f"{use.y}.product")
        builder.node("MatMul", [x, weight], product)
        if bias is not None:
            builder.node("Add", [product, bias], use.y)


def _input(builder: Builder, use: Use) -> str:
    """The input, quantized and dequantized by nodes of this layer alone: onnxruntime leaves layers that share such
    nodes in float."""
    scale, zero_point = use.layer.input_scale.float(), use.layer.input_zero_point.to(torch.int8)
    around = [builder.tensor(f"{use.name}.input_scale", scale), builder.tensor(f"{use.name}.zero_point", zero_point)]
    codes = builder.node("QuantizeLinear", [use.x, *around], builder.free(f"{use.x}.codes"))
    return builder.node("DequantizeLinear", [codes, *around], builder.free(f"{use.x}.dequantized"))


def _weight_scale(use: Use) -> Tensor:
    scale = use.layer.deq.double() / use.layer.input_scale.double()
    if not bool(((scale >= _SMALLEST) & (scale <= torch.finfo(torch.float32).max)).all()):
        raise NumbersError(f"{use.name}: float32 does not hold the scale of its weight. Keep it float.")
    return scale.float()


def _weight(builder: Builder, use: Use, scale: Tensor, axis: int) -> str:
    """The name of the dequantized weight: (out, in, ...), or (in, out) where its channels are along axis 1."""

    def make() -> str:
        codes = use.layer.weight.detach()
        stored = builder.tensor(f"{use.name}.weight{'.T' if axis else ''}", codes.t() if axis else codes)
        scales = builder.tensor(f"{use.name}.weight_scale", scale)
        zeros = builder.tensor(f"{use.name}.weight_zero_point", np.zeros(len(codes), np.int8))
        output = builder.free(f"{use.name}.weight.dequantized")
        return builder.node("DequantizeLinear", [stored, scales, zeros], output, axis=axis)

    return builder.once((use.name, axis), make)


def _bias(builder: Builder, use: Use) -> str | None:
    """The name of the dequantized bias; None where the bias is all zeros."""
    bias = int32_bias(use)
    if not bool(bias.any()):
        return None

    def make() -> str:
        stored = builder.tensor(f"{use.name}.bias", bias)
        scales = builder.tensor(f"{use.name}.bias_scale", use.layer.deq)
        zeros = builder.tensor(f"{use.name}.bias_zero_point", np.zeros(len(bias), np.int32))
        output = builder.free(f"{use.name}.bias.dequantized")
        return builder.node("DequantizeLinear", [stored, scales, zeros], output, axis=0)

    return builder.once((use.name, "bias"), make)
