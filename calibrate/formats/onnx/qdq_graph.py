"""Builds the graph for onnxruntime and OpenVINO, with QuantizeLinear and DequantizeLinear around float operators.

Activations are int8 with a zero point, weights int8 with a scale for each output channel, biases int32. Octavo's layers
multiply the integer sum by deq, the rounded product of input scale and weight scale. So the scale of a weight is
written as deq / input_scale, and the graph multiplies by the same deq with which calibration measured the accuracy. A
Conv pads with the zero point, which stands for 0.0. A W8A16 layer has an int8 weight, which a node dequantizes, and a
float bias.

QuantizeLinear computes clamp(round(x / scale) + zero_point, -128, 127), Octavo's layers clamp(round(x / scale +
zero_point), -128, 127). The two codes can differ by one if x / scale is halfway between two integers, or so near to
halfway that adding the zero point in float32 rounds the sum to halfway. Otherwise both codes are equal. They are always
equal if the zero point is 0.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from octavo.capture.errors import NumbersError, UsageError

from ...layers.modules import QuantizedConv2d, QuantizedLayer
from .graph_builder import Builder, Use, conv_attributes, expand_placeholders, int32_bias
from .placeholders import KEEP_FLOAT

if TYPE_CHECKING:
    from onnx import ModelProto

_SCHEMES = ("W8A8", "W8A16")  # the schemes that the graph has nodes for
_SMALLEST = torch.finfo(torch.float32).smallest_normal  # smallest scale of a weight


def qdq(traced: "ModelProto", layers: Mapping[str, QuantizedLayer]) -> "ModelProto":
    """Builds the graph for onnxruntime from `traced`, in which placeholder nodes stand for the integer `layers`: node
    number i for the layer at position i of the dict.

    Raises UsageError for a layer that is neither static W8A8 nor W8A16. Raises NumbersError for a weight scale that
    float32 does not hold, and for a bias that int32 does not hold.
    """
    for name, layer in layers.items():
        if layer.scheme not in _SCHEMES:
            fact = f"format onnx cannot hold {layer.scheme} layers, only W8A8 and W8A16"
            raise UsageError(f"{name}: {fact}. Calibrate with static activations.")
    return expand_placeholders(traced, layers, _expand)


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
        builder.node("Conv", [x, weight, *([bias] if bias else [])], use.y, **conv_attributes(layer))
    elif use.rank == 2:
        weight = _weight(builder, use, scale, 0)
        builder.node("Gemm", [x, weight, *([bias] if bias else [])], use.y, transB=1)
    else:
        weight = _weight(builder, use, scale, 1)
        product = use.y if bias is None else builder.free_name(f"{use.y}.product")
        builder.node("MatMul", [x, weight], product)
        if bias is not None:
            builder.node("Add", [product, bias], use.y)


def _input(builder: Builder, use: Use) -> str:
    """Adds to `builder` nodes that quantize and dequantize a layer's input, for this layer alone, and returns the name
    of their output. `use` is the place of the layer in the graph.

    If several layers shared the nodes, onnxruntime would compute these layers in float.
    """
    scale, zero_point = use.layer.input_scale.float(), use.layer.input_zero_point.to(torch.int8)
    qparams = [builder.tensor(f"{use.name}.input_scale", scale), builder.tensor(f"{use.name}.zero_point", zero_point)]
    codes = builder.node("QuantizeLinear", [use.x, *qparams], builder.free_name(f"{use.x}.codes"))
    return builder.node("DequantizeLinear", [codes, *qparams], builder.free_name(f"{use.x}.dequantized"))


def _weight_scale(use: Use) -> Tensor:
    scale = use.layer.deq.double() / use.layer.input_scale.double()
    if not bool(((scale >= _SMALLEST) & (scale <= torch.finfo(torch.float32).max)).all()):
        raise NumbersError(f"{use.name}: the scale of the weight is too small or too large for float32. {KEEP_FLOAT}")
    return scale.float()


def _weight(builder: Builder, use: Use, scale: Tensor, axis: int) -> str:
    """Adds to `builder` a layer's weight codes, and a node that dequantizes them with `scale`, (out,). Returns the name
    of the node's output. `use` is the place of the layer in the graph.

    `axis` is the axis of the output channels: the output is (out, in, ...) for 0 and, transposed, (in, out) for 1.
    """

    def make() -> str:
        codes = use.layer.weight.detach()
        stored = builder.tensor(f"{use.name}.weight{'.T' if axis else ''}", codes.t() if axis else codes)
        scales = builder.tensor(f"{use.name}.weight_scale", scale)
        zeros = builder.tensor(f"{use.name}.weight_zero_point", np.zeros(len(codes), np.int8))
        output = builder.free_name(f"{use.name}.weight.dequantized")
        return builder.node("DequantizeLinear", [stored, scales, zeros], output, axis=axis)

    return builder.once((use.name, axis), make)


def _bias(builder: Builder, use: Use) -> str | None:
    """Adds to `builder` a layer's int32 bias, and a node that dequantizes it. Returns the name of the node's output, or
    None if the bias is zero. `use` is the place of the layer in the graph."""
    bias = int32_bias(use)
    if not bool(bias.any()):
        return None

    def make() -> str:
        stored = builder.tensor(f"{use.name}.bias", bias)
        scales = builder.tensor(f"{use.name}.bias_scale", use.layer.deq)
        zeros = builder.tensor(f"{use.name}.bias_zero_point", np.zeros(len(bias), np.int32))
        output = builder.free_name(f"{use.name}.bias.dequantized")
        return builder.node("DequantizeLinear", [stored, scales, zeros], output, axis=0)

    return builder.once((use.name, "bias"), make)
