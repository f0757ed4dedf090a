"""Builds the graph for Ascend's compiler, NAME_quant.onnx, with Ascend's operators in the default domain.

    AscendQuant(scale = 1 / input_scale, offset, quant_bit = 8)   x -> int8
    Conv, Gemm or MatMul    on int8 weights, with an int32 bias = round(bias / deq); deq = input scale * weight scale
    AscendDequant(deq_scale)   int32 -> float; deq_scale is uint64 with the float32 bits of deq in its low half

The offset is the zero point of the input, the code that stands for 0.0. Unlike Octavo's quant_bias, the int32 bias does
not contain the effect of the offset, because Ascend's compiler itself pads with the offset, and subtracts offset times
the sum of the weights from the accumulator (the sum of products). So the accumulator ends with the same number as in
Octavo's integer layer. AscendQuant multiplies by 1 / input_scale where Octavo's layer divides by input_scale;
`layers.reciprocals` chooses float32 scales for which both give the same codes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from octavo.capture.errors import UsageError

from ...layers.freeze import packed
from ...layers.modules import QuantizedConv2d, QuantizedLayer
from .ascend_operators import DEQUANT, QUANT
from .graph_builder import Builder, Use, conv_attributes, expand_placeholders, int32_bias

if TYPE_CHECKING:
    from onnx import ModelProto


def ascend(traced: "ModelProto", layers: Mapping[str, QuantizedLayer], *, fuse_add: bool = True) -> "ModelProto":
    """Builds the graph for Ascend's compiler from `traced`, in which placeholder nodes stand for the integer `layers`:
    node number i for the layer at position i of the dict.

    With `fuse_add` the bias of a Conv or Gemm is its third input. Without `fuse_add`, an Add node adds the bias to the
    accumulator, with the same result. The bias of a MatMul is always an Add node.

    Raises UsageError for a layer that is not static W8A8, the only scheme that Ascend's operators have, and
    NumbersError for a bias that int32 does not hold.
    """
    for name, layer in layers.items():
        if layer.scheme != "W8A8":
            fact = f"format ascend-onnx cannot hold {layer.scheme} layers, only W8A8"
            raise UsageError(f"{name}: {fact}. Calibrate with static activations.")
    return expand_placeholders(traced, layers, lambda builder, use: _expand(builder, use, fuse_add))


def _expand(builder: Builder, use: Use, fuse_add: bool) -> None:
    layer, name = use.layer, use.name
    x, bias = _input(builder, use), int32_bias(use)
    convolution = isinstance(layer, QuantizedConv2d)
    fused = fuse_add and (convolution or use.rank == 2)
    codes = layer.weight.detach()
    transposed = not convolution and use.rank != 2
    inputs = [x, builder.tensor(f"{name}.weight{'.T' if transposed else ''}", codes.t() if transposed else codes)]
    total = builder.free_name(f"{use.y}.accumulator")
    if fused and bool(bias.any()):
        inputs.append(builder.tensor(f"{name}.bias", bias))
    if isinstance(layer, QuantizedConv2d):
        builder.node("Conv", inputs, total, **conv_attributes(layer))
    elif transposed:
        builder.node("MatMul", inputs, total)
    else:
        builder.node("Gemm", inputs, total, transB=1)
    if not fused and bool(bias.any()):
        shape = (-1, 1, 1) if convolution else (-1,)
        added = builder.tensor(f"{name}.bias.added", bias.view(shape))
        total = builder.node("Add", [total, added], builder.free_name(f"{use.y}.biased"))
    scales = builder.tensor(f"{name}.deq_scale", packed(layer.deq).cpu().numpy().astype(np.uint64))
    builder.node(DEQUANT, [total, scales], use.y)


def _input(builder: Builder, use: Use) -> str:
    """Adds to `builder` the AscendQuant node that computes the codes of a layer's input, and returns the name of these
    codes in the graph. `use` is the place of the layer in the graph.

    Layers with the same input, scale and zero point share one node.
    """
    scale, offset = 1.0 / float(use.layer.input_scale), float(use.layer.input_zero_point)
    output = f"{use.x}.codes"
    return builder.once(
        (use.x, scale, offset),
        lambda: builder.node(QUANT, [use.x], builder.free_name(output), scale=scale, offset=offset, quant_bit=8),
    )
