"""Lists the layers of an ONNX graph, and checks whether its scales and zero points are valid, whether an
int32 sum can overflow, and which runtimes can load the graph."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..verdict import Verdict
from .ascend_operators import DEQUANT, QUANT
from .read import Graph, opset_of

if TYPE_CHECKING:
    from onnx import NodeProto

    Array = np.ndarray[Any, Any]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators that have a weight
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_ENDS = (".weight", ".weight.T")  # endings that an export appends to a layer's name; .T: transposed
_INTEGER = ("Conv", "Gemm", "MatMul")  # operators that Ascend computes in integers
_SCHEMES = ("W8A8", "W8A16")  # the schemes of integer layers in a graph


class Layer(NamedTuple):
    """Describes a node that has a weight: the name of its layer, its operator, its scheme (W8A8, W8A16 or float), and
    the shape and the bytes of the weight."""

    name: str
    operator: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int


class _GraphIndex:
    """Finds parts of a graph by name: the initializer with a given name, and the node whose output has a given name."""

    def __init__(self, graph: Graph) -> None:
        self.graph, proto = graph, graph.proto
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.producers = {name: node for node in proto.graph.node for name in node.output}

    def kind(self, name: str) -> str:
        node = self.producers.get(name)
        return node.op_type if node is not None else ""

    def values(self, name: str) -> "Array":
        return self.graph.array(self.initializers[name])


def layers_of(graph: Graph) -> list[Layer]:
    """Returns the nodes of the graph that have weights, integer and float ones, in the order of the graph."""
    index, layers = _GraphIndex(graph), []
    for node in graph.proto.graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2:
            continue
        weight = node.input[1]
        scheme = "float"
        if index.kind(weight) == "DequantizeLinear":
            weight = index.producers[weight].input[0]
            scheme = "W8A8" if index.kind(node.input[0]) == "DequantizeLinear" else "W8A16"
        elif index.kind(node.input[0]) == QUANT:
            scheme = "W8A8"
        tensor = index.initializers.get(weight)
        if tensor is None:
            continue  # a product of two activations, as in attention
        name = next((weight.removesuffix(end) for end in _ENDS if weight.endswith(end)), node.name or node.output[0])
        shape = tuple(tensor.dims)
        layers.append(Layer(name, node.op_type, scheme, shape, _bytes(index, tensor)))
    return layers


def _bytes(index: _GraphIndex, tensor: Any) -> int:
    from onnx import helper

    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def verdicts(graph: Graph) -> list[Verdict]:
    """Returns the verdicts on a graph: whether its scales and zero points are valid and its int32 sums cannot overflow,
    and whether onnxruntime and Ascend's compiler can load it."""
    fault = next(_faults(graph), None)
    layers = [layer for layer in layers_of(graph) if layer.scheme in _SCHEMES]
    fact = f"all numbers of {len(layers)} integer layers are within bounds"
    numbers = Verdict("octavo", "numbers", fault is None, fault or fact)
    return [numbers, _onnxruntime(graph), _ascend(graph, layers)]


def _onnxruntime(graph: Graph) -> Verdict:
    if any(node.op_type in (QUANT, DEQUANT) for node in graph.proto.graph.node):
        fact = f"onnxruntime has no operator {QUANT}. Give it *_quant_qdq.onnx"
        return Verdict("onnxruntime", "graph", False, fact)
    try:
        import onnxruntime
    except ImportError:
        return Verdict(
            "onnxruntime", "graph", False, "onnxruntime is not installed, so not tried. Install octavo[onnx]"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        return Verdict("onnxruntime", "graph", False, " ".join(str(error).split())[:300])
    return Verdict("onnxruntime", "graph", True, f"version {onnxruntime.__version__} loads it")


def _ascend(graph: Graph, layers: list[Layer]) -> Verdict:
    nodes = graph.proto.graph.node
    foreign = sorted({node.domain for node in nodes} - {"", "ai.onnx"})
    if foreign:
        return Verdict(
            "Ascend", "graph", False, f"has operators of the domain {foreign[0]}, which Ascend does not know"
        )
    if any(node.op_type in _QDQ for node in nodes):
        fact = "QuantizeLinear does not give int8 layers on Ascend. Give it *_quant.onnx"
        return Verdict("Ascend", "graph", False, fact)
    if not any(node.op_type == QUANT for node in nodes):
        return Verdict("Ascend", "graph", True, "loads as a float model: no layer is quantized")
    return Verdict(
        "Ascend", "graph", True, f"{len(layers)} layers between {QUANT} and {DEQUANT}, opset {opset_of(graph.proto)}"
    )


def _faults(graph: Graph) -> Iterator[str]:
    index = _GraphIndex(graph)
    for node in graph.proto.graph.node:
        if node.op_type == QUANT:
            yield from _quant_faults(node)
        elif node.op_type == DEQUANT:
            yield from _dequant_faults(index, node)
        elif node.op_type in _QDQ and node.input[1] in index.initializers:
            yield from [] if _positive(index.values(node.input[1])) else [f"{node.input[1]} is not positive and finite"]


def _positive(values: "Array") -> bool:
    return bool((np.isfinite(values) & (values > 0)).all())


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _quant_faults(node: "NodeProto") -> Iterator[str]:
    attributes = _attributes(node)
    scale, offset, bits = attributes["scale"], attributes["offset"], attributes["quant_bit"]
    if not _positive(np.asarray(scale)):
        yield f"{node.name}: scale is {scale}, not positive and finite"
    if bits != 8 or not (-128 <= offset <= 127 and offset == round(offset)):
        yield f"{node.name}: quant_bit is {bits} and offset {offset}, not 8 and a whole number from -128 to 127"


def _dequant_faults(index: _GraphIndex, node: "NodeProto") -> Iterator[str]:
    """Yields the first fault of an AscendDequant node in words; nothing if the node has no fault. `index` finds the
    nodes and initializers of the graph by name.

    A sound node gets its input from an integer layer whose accumulator fits into int32, and has one scale for each
    output of the layer.
    """
    layer, bias = index.producers.get(node.input[0]), ""
    if layer is not None and layer.op_type == "Add":
        bias = next((name for name in layer.input if name in index.initializers), "")
        layer = index.producers.get(next((name for name in layer.input if name != bias), ""))
    quant = None if layer is None or layer.op_type not in _INTEGER else index.producers.get(layer.input[0])
    if layer is None or quant is None or quant.op_type != QUANT:
        yield f"{node.name}: no integer layer before this {DEQUANT}"
        return
    names = [layer.input[1], node.input[1], bias or (layer.input[2] if len(layer.input) > 2 else "")]
    if not all(name in index.initializers for name in names if name):
        yield f"{node.name}: the weight, bias or deq_scale of its layer is not an initializer of the graph"
        return
    weight, deq, added = (index.values(name) if name else np.zeros(1, np.int32) for name in names)
    if layer.op_type == "MatMul" or (layer.op_type == "Gemm" and not _attributes(layer).get("transB")):
        weight = weight.T
    if (weight.dtype, deq.dtype, added.dtype) != (np.int8, np.uint64, np.int32):
        yield f"{layer.input[1]}: {weight.dtype} with a bias of {added.dtype} and deq_scale of {deq.dtype}"
    elif deq.shape != (len(weight),) or added.size not in (1, len(weight)):
        yield f"{node.input[1]}: {deq.size} scales for {len(weight)} outputs"
    elif bool((deq >> np.uint64(32)).any()) or not _positive(deq.astype(np.uint32).view(np.float32)):
        yield f"{node.input[1]}: does not hold the bits of positive float32 numbers"
    elif _largest_sum(weight, added, int(_attributes(quant)["offset"])) >= 2**31:
        yield f"{layer.input[1]}: the accumulator of its layer could overflow int32"


def _largest_sum(weight: "Array", bias: "Array", offset: int) -> int:
    """Returns the largest magnitude that a layer's int32 accumulator can reach for any int8 codes of the input. The
    accumulator is the sum of products plus `bias` minus `offset` * sum(weight). Ascend's compiler subtracts this last
    term, where `offset` is the zero point of the input."""
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    start = bias.reshape(-1).astype(np.int64) - offset * rows.sum(1)
    return int((np.abs(start) + 128 * np.abs(rows).sum(1)).max())
