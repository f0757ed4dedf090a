"""Runs a graph with Ascend's operators on the CPU, with the integers that an Ascend device computes.

onnx.reference executes the float operators. The operators between AscendQuant and AscendDequant are computed in whole
numbers by this module, as Ascend's compiler has the device do: a Conv is padded with the offset (zero point) of the
AscendQuant before it, and offset times the sum of the weights is subtracted from the accumulator, the integer sum of
products.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from octavo.capture.errors import FileError

from .ascend_operators import DEQUANT, QUANT

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    Array = np.ndarray[Any, Any]

_DEVICE = "octavo.device"  # the domain of the operators that this module implements
_INTEGER = ("Conv", "Gemm", "MatMul")


class AscendGraph:
    """The graph `proto` with Ascend's operators, ready to run. Raises FileError for operators that Ascend's compiler
    refuses."""

    def __init__(self, proto: "ModelProto") -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(compiled(proto), new_ops=_operators())

    def __call__(self, **inputs: "Array") -> list["Array"]:
        return list(self._evaluator.run(None, inputs))


def compiled(proto: "ModelProto") -> "ModelProto":
    """Returns a copy of the graph `proto` in which the integer operators have the attributes that Ascend's compiler
    derives. An operator on int8 codes gets `offset`, the zero point of the codes. An AscendDequant gets `axis`, the
    axis of the channels.

    Raises FileError for an operator other than Conv, Gemm and MatMul on the codes of an AscendQuant.
    """
    from onnx import ModelProto, helper

    copy = ModelProto()
    copy.CopyFrom(proto)
    nodes = copy.graph.node
    offsets = {node.output[0]: _attributes(node)["offset"] for node in nodes if node.op_type == QUANT}
    convolved = {name for node in nodes if node.op_type == "Conv" and node.input[0] in offsets for name in node.output}
    for node in nodes:
        if any(name in offsets for name in node.input):
            if node.op_type not in _INTEGER or node.input[0] not in offsets:
                raise FileError(
                    f"{node.name}: Ascend's compiler refuses a {node.op_type} that reads the codes of an AscendQuant. "
                    "Export the graph again."
                )
            node.attribute.append(helper.make_attribute("offset", offsets[node.input[0]]))
            node.domain = _DEVICE
        elif node.op_type == "Add" and node.input[0] in convolved:
            convolved.add(node.output[0])
        elif node.op_type == DEQUANT:
            node.attribute.append(helper.make_attribute("axis", 1 if node.input[0] in convolved else -1))
            node.domain = _DEVICE
    copy.opset_import.append(helper.make_opsetid(_DEVICE, 1))
    return copy


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _codes(x: "Array", scale: float, offset: float) -> "Array":
    codes = np.rint(x.astype(np.float32) * np.float32(scale) + np.float32(offset))
    return np.clip(codes, -128, 127).astype(np.int8)


def _dequantized(total: "Array", deq_scale: "Array", axis: int) -> "Array":
    scale = (deq_scale & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    scale = scale.reshape(-1, 1, 1) if axis == 1 else scale
    return total.astype(np.float32) * scale


def _exact(codes: "Array", offset: float) -> torch.Tensor:
    # float64 holds sums of these whole numbers exactly
    return torch.from_numpy(codes.astype(np.float64) - offset)


def _convolved(x: "Array", weight: "Array", bias: "Array | None", offset: float, attributes: dict[str, Any]) -> "Array":
    top, left, bottom, right = attributes["pads"]
    padded = F.pad(_exact(x, offset), (left, right, top, bottom))  # with zeros: a padding code equals the offset
    kernel = torch.from_numpy(weight.astype(np.float64))
    total = F.conv2d(padded, kernel, None, attributes["strides"], 0, attributes["dilations"], attributes["group"])
    return _whole(total, bias if bias is None else bias.reshape(-1, 1, 1))


def _multiplied(x: "Array", weight: "Array", bias: "Array | None", offset: float) -> "Array":
    return _whole(_exact(x, offset) @ torch.from_numpy(weight.astype(np.float64)), bias)


def _whole(total: torch.Tensor, bias: "Array | None") -> "Array":
    accumulator: Array = total.numpy().astype(np.int64) + (0 if bias is None else bias.astype(np.int64))
    return accumulator.astype(np.int32)


def _operators() -> list[Any]:
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        def _run(self, x: Any, scale: Any = None, offset: Any = None, quant_bit: Any = None) -> Any:
            return (_codes(x, scale, offset),)

    class Dequant(OpRun):
        op_domain = _DEVICE

        def _run(self, x: Any, deq_scale: Any, axis: Any = None) -> Any:
            return (_dequantized(x, deq_scale, axis),)

    class Conv(OpRun):
        op_domain = _DEVICE

        def _run(self, x: Any, weight: Any, bias: Any = None, offset: Any = None, **attributes: Any) -> Any:
            return (_convolved(x, weight, bias, offset, attributes),)

    class Gemm(OpRun):
        op_domain = _DEVICE

        def _run(self, x: Any, weight: Any, bias: Any = None, offset: Any = None, transB: Any = 0, **_: Any) -> Any:
            return (_multiplied(x, weight.T if transB else weight, bias, offset),)

    class MatMul(OpRun):
        op_domain = _DEVICE

        def _run(self, x: Any, weight: Any, offset: Any = None) -> Any:
            return (_multiplied(x, weight, None, offset),)

    Quant.__name__, Dequant.__name__ = QUANT, DEQUANT
    return [Quant, Dequant, Conv, Gemm, MatMul]
