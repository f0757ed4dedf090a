"""Replaces the placeholders of a traced graph. A placeholder is a node that stands for an integer layer; ONNX nodes and
initializers take its place, under names that the graph does not use yet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from octavo.capture.errors import NumbersError

from ...layers.modules import QuantizedConv2d, QuantizedLayer
from .placeholders import DOMAIN, KEEP_FLOAT, attribute, bodies, is_placeholder

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

IR_VERSION = 10  # version of the ONNX file format that every graph gets, whichever version the exporter wrote
_SYMBOL = "batch"  # name of the first axis of inputs and outputs, where its length is open


class Builder:
    """Collects new nodes and initializers for a graph. `used` are the names that the graph already has. `free_name`
    returns names that are neither in `used` nor returned before."""

    def __init__(self, used: set[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, Any] = {}
        self._used = set(used)
        self._names: dict[Any, str] = {}  # names in the graph by key

    def free_name(self, name: str) -> str:
        """Reserves and returns an unused name: `name`, or `name` with a number appended if it is in use."""
        unused, count = name, 1
        while unused in self._used:
            count += 1
            unused = f"{name}.{count}"
        self._used.add(unused)
        return unused

    def tensor(self, name: str, values: Tensor | np.ndarray) -> str:
        """Adds an initializer with these values, and returns its name in the graph: `name`, with a number appended if
        that name is in use. A second call with the same `name` adds nothing and returns what the first call
        returned."""
        from onnx import numpy_helper

        key = ("tensor", name)
        if key not in self._names:
            self._names[key] = self.free_name(name)
            array = values.detach().cpu().contiguous().numpy() if isinstance(values, Tensor) else values
            self.initializers[self._names[key]] = numpy_helper.from_array(array, self._names[key])
        return self._names[key]

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node of the operator `kind` with the named `inputs` and one output, called `output`. Returns
        `output`."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}/{kind}", **attributes))
        return output

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """Calls `make` when this `key` is given for the first time, and returns its result, the name of a tensor in the
        graph. Later calls with the same key return the same name without calling `make`."""
        if key not in self._names:
            self._names[key] = make()
        return self._names[key]


@dataclass(frozen=True)
class Use:
    """One use of a layer in a graph, which may use a layer several times: the layer and its name, the names of its
    input tensor `x` and output tensor `y`, and `rank`, the number of axes of the input."""

    name: str
    layer: QuantizedLayer
    x: str
    y: str
    rank: int


Expand = Callable[[Builder, Use], None]


def expand_placeholders(traced: "ModelProto", layers: Mapping[str, QuantizedLayer], expand: Expand) -> "ModelProto":
    """Returns a copy of the graph `traced` in which each placeholder, a node that stands for an integer layer, is
    replaced. `expand` is called with a Builder and a Use, one use of a layer, and adds the nodes of the layer to the
    Builder.

    Placeholder number i stands for the layer at position i of the dict `layers`. The copy contains nothing about the
    machine or the time of the export.
    """
    from onnx import ModelProto, helper

    proto = ModelProto()
    proto.CopyFrom(traced)
    graph, order = proto.graph, list(layers)
    builder = Builder(_names(graph))
    _name_outputs(proto, order, builder)
    for node in list(graph.node):
        if is_placeholder(node):
            name = order[attribute(node, "index")]
            expand(builder, Use(name, layers[name], node.input[0], node.output[0], attribute(node, "rank")))
        else:
            builder.nodes.append(node)
    nodes = list(builder.nodes)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(builder.initializers.values())
    graph.initializer.sort(key=lambda tensor: tensor.name)  # in place: a message of more than 2 GiB cannot be copied
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    others = {entry.domain for entry in proto.opset_import} - {"", DOMAIN}
    domains = others & {node.domain for node in nodes}
    opsets = [("", opset), *((entry.domain, entry.version) for entry in proto.opset_import if entry.domain in domains)]
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets)
    _remove_origins(proto)
    return proto


def float_graph(traced: "ModelProto") -> "ModelProto":
    """Returns the graph to write for a float model: `traced` without the exporter's notes on the machine and on the
    model's code."""
    return expand_placeholders(traced, {}, lambda builder, use: None)


def _name_outputs(proto: "ModelProto", order: list[str], builder: Builder) -> None:
    """Gives the output of each placeholder, a node that stands for an integer layer during tracing, the name of the
    layer; the exporter had given the output only a number. `order` has the names of the layers. A placeholder whose
    attribute `index` is i stands for the layer order[i]. `builder` makes the names unique."""
    graph = proto.graph
    placeholders = [node for node in graph.node if is_placeholder(node)]
    new_names = {node.output[0]: builder.free_name(order[attribute(node, "index")]) for node in placeholders}
    for node in (*graph.node, *(node for body in bodies(proto) for node in body)):
        for names in (node.input, node.output):
            names[:] = [new_names.get(name, name) for name in names]
    for value in graph.output:
        value.name = new_names.get(value.name, value.name)


def _names(graph: Any) -> set[str]:
    nodes = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
    return nodes | {value.name for value in (*graph.initializer, *graph.input, *graph.output)}


def _remove_origins(proto: "ModelProto") -> None:
    """Removes the exporter's notes on where nodes come from in the model's code, and names Octavo as the producer."""
    proto.producer_name, proto.producer_version, proto.doc_string = "octavo", "", ""
    proto.ir_version = IR_VERSION
    graph = proto.graph
    graph.name, graph.doc_string = "model", ""
    functions = [node for function in proto.functions for node in function.node]
    for message in (
        proto,
        graph,
        *proto.functions,
        *graph.node,
        *functions,
        *graph.initializer,
        *graph.input,
        *graph.output,
    ):
        del message.metadata_props[:]
        message.doc_string = ""
    _name_batch_axis(graph)


def _name_batch_axis(graph: Any) -> None:
    """Renames the batch axis to `batch`, in place, in all inputs and outputs of the graph. The exporter has given every
    axis of this length the same name, a made-up symbol. The symbol is read from the first input whose axis 0 has a
    variable length."""
    symbol = next((d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim[:1] if d.dim_param), None)
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param == symbol:
                dim.dim_param = _SYMBOL


def int32_bias(use: Use) -> Tensor:
    """Returns the int32 bias of the layer `use.layer`: bias plus bias correction, divided by deq (input scale * weight
    scale) and rounded. This bias is quant_bias without the effect of the zero point.

    Raises NumbersError if this bias is outside int32.
    """
    layer = use.layer
    sums = layer.weight.detach().flatten(1).sum(1, dtype=layer.quant_bias.long().dtype)
    bias = layer.quant_bias.long() + layer.input_zero_point.long() * sums
    if int(bias.abs().max()) >= 2**31:
        fact = "the bias, divided by input scale times weight scale, is too large for int32"
        raise NumbersError(f"{use.name}: {fact}. {KEEP_FLOAT}")
    return bias.int()


def conv_attributes(layer: QuantizedConv2d) -> dict[str, Any]:
    """Returns the attributes of the Conv node of a convolution: kernel_shape, strides, pads, dilations and group.

    For a padding mode other than zeros, `pads` are zero, because a Pad node before the Conv pads.
    """
    geometry = layer.geometry
    left, right, top, bottom = geometry.padding if geometry.padding_mode == "zeros" else (0, 0, 0, 0)
    return {
        "kernel_shape": list(layer.kernel_size), "strides": list(geometry.stride), "pads": [top, left, bottom, right],
        "dilations": list(geometry.dilation), "group": geometry.groups,
    }  # fmt: skip
