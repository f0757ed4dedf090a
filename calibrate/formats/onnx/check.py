"""Checks a graph: the layers in it, whether its numbers can be right, and who can load it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..verdict import Verdict
from .ascend_operators import DEQUANT, QUANT
from .read import Graph, opset_of

if TYPE_CHECKING:
    from onnx import NodeProto

    Array = np.ndarray[Any, Any]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_ENDS = (".weight", ".weight.T")
_INTEGER = ("Conv", "Gemm", "MatMul")
_SCHEMES = ("W8A8", "W8A16")


class Layer(NamedTuple):
    """A node with a weight: `scheme` is W8A8, W8A16 or float."""

    name: str
    operator: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int


class _Found:
    """A graph with its initializers, and the node that makes each tensor, by name."""

    def __init__(self, graph: Graph) -> None:
        self.graph, proto = graph, graph.proto
        self.initializers = {each.name: each for each in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}

    def kind(self, name: str) -> str:
        """The operator that makes the tensor `name`; "" for an input or an initializer."""
        node = self.makers.get(name)
        return node.op_type if node is not None else ""

    def values(self, name: str) -> "Array":
        """The values of the initializer `name`."""
        return self.graph.array(self.initializers[name])


def layers_of(graph: Graph) -> list[Layer]:
    """The nodes with weights, float ones too, in the order of the graph."""
    found, layers = _Found(graph), []
    for node in graph.proto.graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2:
            continue
        weight = node.input[1]
        scheme = "float"
        if found.kind(weight) == "DequantizeLinear":
            weight = found.makers[weight].input[0]
            scheme = "W8A8" if found.kind(node.input[0]) == "DequantizeLinear" else "W8A16"
        elif found.kind(node.input[0]) == QUANT:
            scheme = "W8A8"
        tensor = found.initializers.get(weight)
        if tensor is None:
            continue  # a product of two activations, as in attention
        name = next((weight.removesuffix(end) for end in _ENDS if weight.endswith(end)), node.name or node.output[0])
        shape = tuple(tensor.dims)
        layers.append(Layer(name, node.op_type, scheme, shape, _bytes(found, tensor)))
    return layers


def _bytes(found: _Found, tensor: Any) -> int:
    from onnx import helper

    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def verdicts(graph: Graph) -> list[Verdict]:
    """The verdicts on a graph: who can load it, and whether its numbers are ones that an export writes."""
    wrong = next(_wrong(graph), None)
    layers = [layer for layer in layers_of(graph) if layer.scheme in _SCHEMES]
    numbers = Verdict("octavo", "numbers", wrong is None, wrong or f"{len(layers)} integer layers within bounds")
    return [numbers, _onnxruntime(graph), _ascend(graph, layers)]


def _onnxruntime(graph: Graph) -> Verdict:
    if any(node.op_type in (QUANT, DEQUANT) for node in graph.proto.graph.node):
        return Verdict("onnxruntime", "graph", False, f"it has no operator {QUANT}; *_quant_qdq.onnx is for it")
    try:
        import onnxruntime
    except ImportError:
        return Verdict("onnxruntime", "graph", False, "not installed, so not tried. Install octavo[onnx]")
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
        return Verdict("Ascend", "graph", False, f"operators of the domain {foreign[0]}")
    if any(node.op_type in _QDQ for node in nodes):
        return Verdict("Ascend", "graph", False, "QuantizeLinear is not its way to int8; *_quant.onnx is for it")
    if not any(node.op_type == QUANT for node in nodes):
        return Verdict("Ascend", "graph", True, "as a float model: nothing is quantized")
    return Verdict(
        "Ascend", "graph", True, f"{len(layers)} layers between {QUANT} and {DEQUANT}, opset {opset_of(graph.proto)}"
    )


def _wrong(graph: Graph) -> Iterator[str]:
    """Yields each fault of the numbers in a graph."""
    found = _Found(graph)
    for node in graph.proto.graph.node:
        if node.op_type == QUANT:
            yield from _wrong_quant(node)
        elif node.op_type == DEQUANT:
            yield from _wrong_dequant(found, node)
        elif node.op_type in _QDQ and node.input[1] in found.initializers:
            yield from [] if _positive(found.values(node.input[1])) else [f"{node.input[1]} is not positive and finite"]


def _positive(values: "Array") -> bool:
    return bool((np.isfinite(values) & (values > 0)).all())


def _given(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _wrong_quant(node: "NodeProto") -> Iterator[str]:
    given = _given(node)
    if not _positive(np.asarray(given["scale"])):
        yield f"{node.name}: scale is {given['scale']}"
    if given["quant_bit"] != 8 or not (-128 <= given["offset"] <= 127 and given["offset"] == round(given["offset"])):
        yield f"{node.name}: quant_bit is {given['quant_bit']}, offset {given['offset']}"


def _wrong_dequant(found: _Found, node: "NodeProto") -> Iterator[str]:
    """Yields a fault of a dequantizer, which needs an integer layer before it with one output for each scale, and a sum
    within int32."""
    made, bias = found.makers.get(node.input[0]), ""
    if made is not None and made.op_type == "Add":
        bias = next((name for name in made.input if name in found.initializers), "")
        made = found.makers.get(next((name for name in made.input if name != bias), ""))
    quant = None if made is None or made.op_type not in _INTEGER else found.makers.get(made.input[0])
    if made is None or quant is None or quant.op_type != QUANT:
        yield f"{node.name}: no integer layer before it"
        return
    names = [made.input[1], node.input[1], bias or (made.input[2] if len(made.input) > 2 else "")]
    if not all(name in found.initializers for name in names if name):
        yield f"{node.name}: its numbers are not in the graph"
        return
    weight, deq, added = (found.values(name) if name else np.zeros(1, np.int32) for name in names)
    if made.op_type == "MatMul" or (made.op_type == "Gemm" and not _given(made).get("transB")):
        weight = weight.T
    if (weight.dtype, deq.dtype, added.dtype) != (np.int8, np.uint64, np.int32):
        yield f"{made.input[1]}: {weight.dtype} with a bias of {added.dtype} and deq_scale of {deq.dtype}"
    elif deq.shape != (len(weight),) or added.size not in (1, len(weight)):
        yield f"{node.input[1]}: {deq.size} scales for {len(weight)} outputs"
    elif bool((deq >> np.uint64(32)).any()) or not _positive(deq.astype(np.uint32).view(np.float32)):
        yield f"{node.input[1]}: not the bits of positive float32 numbers"
    elif _widest(weight, added, int(_given(quant)["offset"])) >= 2**31:
        yield f"{made.input[1]}: its accumulator could leave int32"


def _widest(weight: "Array", bias: "Array", offset: int) -> int:
    """The largest possible magnitude of the accumulator, less the offset's share as the compiler subtracts it."""
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    start = bias.reshape(-1).astype(np.int64) - offset * rows.sum(1)
    return int((np.abs(start) + 128 * np.abs(rows).sum(1)).max())
