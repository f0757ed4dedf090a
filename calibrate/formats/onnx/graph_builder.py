"""Replaces the placeholders of a traced graph by the nodes and initializers of their layers, under free names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from octavo.capture.errors import NumbersError

from ...layers.modules import QuantizedConv2d, QuantizedLayer
from .placeholders import DOMAIN, attribute, bodies, is_mark

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

IR_VERSION = 10  # version of the file format that is written into the graph, whatever the exporter's
_SYMBOL = "batch"  # name of the open first axis


class Builder:
    """Collects the nodes and initializers of a graph; something asked for twice under one key is made once."""

    def __init__(self, taken: set[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, Any] = {}
        self._taken = set(taken)
        self._made: dict[Any, str] = {}

    def free(self, name: str) -> str:
        """Takes a free name: `name`, with a number behind where that is in use."""
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}.{count}"
        self._taken.add(found)
        return found

    def tensor(self, name: str, values: Tensor | np.ndarray) -> str:
        """Adds an initializer, one for each `name`, and returns the name it has in the graph."""
        from onnx import numpy_helper

        key = ("tensor", name)
        if key not in self._made:
            self._made[key] = self.free(name)
            array = values.detach().cpu().contiguous().numpy() if isinstance(values, Tensor) else values
            self.initializers[self._made[key]] = numpy_helper.from_array(array, self._made[key])
        return self._made[key]

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node with this output, and returns the output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}/{kind}", **attributes))
        return output

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """Returns the name that `make` gave for `key` the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Use:
    """One use of a layer: its name, the names `x` of its input and `y` of its output, and the `rank` of the input."""

    name: str
    layer: QuantizedLayer
    x: str
    y: str
    rank: int


Expand = Callable[[Builder, Use], None]


def expanded(traced: "ModelProto", layers: Mapping[str, QuantizedLayer], expand: Expand) -> "ModelProto":
    """A graph in which the nodes that `expand` adds replace each placeholder of `traced`. The graph contains nothing
    about the machine or the time of the export."""
    from onnx import ModelProto, helper

    proto = ModelProto()
    proto.CopyFrom(traced)
    graph, order = proto.graph, list(layers)
    builder = Builder(_names(graph))
    _name_outputs(proto, order, builder)
    for node in list(graph.node):
        if is_mark(node):
            name = order[attribute(node, "index")]
            expand(builder, Use(name, layers[name], node.input[0], node.output[0], attribute(node, "rank")))
        else:
            builder.nodes.append(node)
    nodes = list(builder.nodes)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(builder.initializers.values())
    graph.initializer.sort(key=lambda tensor: tensor.name)  # in place: a message of more than 2 GiB cannot be copied
    opset = next(each.version for each in proto.opset_import if each.domain == "")
    others = {each.domain for each in proto.opset_import} - {"", DOMAIN}
    used = {node.domain for node in nodes}
    kept = [each for each in proto.opset_import if each.domain in others & used]
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(each.domain, each.version) for each in kept)]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    _anonymous(proto)
    return proto


def floating(traced: "ModelProto") -> "ModelProto":
    """The graph of a float model, which was traced without placeholders."""
    return expanded(traced, {}, lambda builder, use: None)


def _name_outputs(proto: "ModelProto", order: list[str], builder: Builder) -> None:
    """Renames the output of each placeholder to its layer's name, everywhere; the exporter numbers outputs."""
    graph = proto.graph
    new = {node.output[0]: builder.free(order[attribute(node, "index")]) for node in graph.node if is_mark(node)}
    for node in (*graph.node, *(node for body in bodies(proto) for node in body)):
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for value in graph.output:
        value.name = new.get(value.name, value.name)


def _names(graph: Any) -> set[str]:
    nodes = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
    return nodes | {each.name for each in (*graph.initializer, *graph.input, *graph.output)}


def _anonymous(proto: "ModelProto") -> None:
    """Removes the exporter's notes on the origin of nodes, and names Octavo as the producer."""
    proto.producer_name, proto.producer_version, proto.doc_string = "octavo", "", ""
    proto.ir_version = IR_VERSION
    graph = proto.graph
    graph.name, graph.doc_string = "model", ""
    functions = [node for function in proto.functions for node in function.node]
    for each in (
        proto,
        graph,
        *proto.functions,
        *graph.node,
        *functions,
        *graph.initializer,
        *graph.input,
        *graph.output,
    ):
        del each.metadata_props[:]
        each.doc_string = ""
    _name_the_batch(graph)


def _name_the_batch(graph: Any) -> None:
    """Renames the open first axis, which the exporter numbers, to `batch`."""
    symbol = next((d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim[:1] if d.dim_param), None)
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param == symbol:
                dim.dim_param = _SYMBOL


def int32_bias(use: Use) -> Tensor:
    """The int32 bias, round(bias / deq) with the correction: quant_bias without the zero point's share."""
    layer = use.layer
    sums = layer.weight.detach().flatten(1).sum(1, dtype=layer.quant_bias.long().dtype)
    bias = layer.quant_bias.long() + layer.input_zero_point.long() * sums
    if int(bias.abs().max()) >= 2**31:
        raise NumbersError(f"{use.name}: its bias is outside int32 in steps of its accumulator. Keep it float.")
    return bias.int()


def convolving(layer: QuantizedConv2d) -> dict[str, Any]:
    """The attributes of a Conv. Padding other than zeros has its own Pad before the Conv."""
    geometry = layer.geometry
    left, right, top, bottom = geometry.padding if geometry.padding_mode == "zeros" else (0, 0, 0, 0)
    return {
        "kernel_shape": list(layer.kernel_size), "strides": list(geometry.stride), "pads": [top, left, bottom, right],
        "dilations": list(geometry.dilation), "group": geometry.groups,
    }  # fmt: skip
