"""Defines the placeholders that stand for integer layers while a model is traced: a torch module and a graph node."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...layers.install import names_of, replace
from ...layers.modules import QuantizedConv2d, QuantizedLayer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DOMAIN, OPERATOR = "octavo", "Layer"  # the ONNX domain and operator of a placeholder node
OPSET = 18  # version of the ONNX operators that the exporters write
# ends a message that begins with the name of a layer
KEEP_FLOAT = "Keep the layer float (--keep-float, or disable_names in Python)."
_SIZES = (  # attributes of layers that a model's own code may read, for example to pad for a stride
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups",
    "padding_mode",
)  # fmt: skip


class Placeholder(nn.Module):
    """A module that stands for the integer `layer` while the model is traced. In the graph it is one node, whose
    attribute `index` is the number `index`, so that the node can later be replaced by the nodes of the layer.

    The module's output has the shape, dtype and device of the layer's output. `torchscript` is True if torch's
    TorchScript exporter traces, False for its dynamo exporter.
    """

    mul_scale: Tensor | None

    def __init__(self, index: int, layer: QuantizedLayer, torchscript: bool) -> None:
        super().__init__()
        self.index, self.torchscript = index, torchscript
        self.outputs, *self.size = layer.weight.shape[0], *layer.weight.shape[2:]
        vars(self).update({name: value for name, value in vars(layer).items() if name in _SIZES})
        self.geometry = layer.geometry if isinstance(layer, QuantizedConv2d) else None
        self.register_buffer("mul_scale", layer.mul_scale)

    def forward(self, input: Tensor) -> Tensor:
        if self.geometry is not None and input.ndim == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x = input
        if self.mul_scale is not None:
            x = x * self.mul_scale.to(x.dtype).view([-1, 1, 1] if self.geometry else [-1])
        if self.geometry is not None and self.geometry.padding_mode != "zeros":
            x = self.geometry.padded(x, 0.0)
        x = x if x.dtype == torch.float32 else x.to(torch.float32)
        shape = self.shape_of(x)
        if self.torchscript:
            y = getattr(torch.ops, DOMAIN).placeholder(x, self.index, x.ndim, shape)
        else:
            numbers: dict[str, Any] = {"index": self.index, "rank": x.ndim}
            y = torch.onnx.ops.symbolic(f"{DOMAIN}::{OPERATOR}", (x,), numbers, dtype=x.dtype, shape=shape, version=1)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def shape_of(self, x: Tensor) -> tuple[Any, ...]:
        """Returns the shape of the layer's output for the input `x`. If the layer pads with anything but zeros, `x` is
        already padded."""
        if self.geometry is None:
            return (*x.shape[:-1], self.outputs)
        left, right, top, bottom = self.geometry.padding if self.geometry.padding_mode == "zeros" else (0, 0, 0, 0)
        lengths = x.shape[-2] + top + bottom, x.shape[-1] + left + right
        axes = zip(lengths, self.size, self.geometry.stride, self.geometry.dilation, strict=True)
        positions = [(length - dilation * (size - 1) - 1) // stride + 1 for length, size, stride, dilation in axes]
        return (x.shape[0], self.outputs, *positions)


@contextmanager
def placeholders_installed(model: nn.Module, layers: Mapping[str, QuantizedLayer], torchscript: bool) -> Iterator[None]:
    """Context manager inside which `model` is in eval mode and has placeholders in place of the layers that `layers`
    names, numbered in the order of `layers`. `torchscript`: whether torch's older exporter, which traces with
    TorchScript, exports the model. Afterwards the model is as it was before."""
    names = names_of(model)
    before = {name: model.get_submodule(name) for first in layers for name in names[first]}
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for index, (first, layer) in enumerate(layers.items()):
            placeholder = Placeholder(index, layer, torchscript).eval()
            for name in names[first]:
                replace(model, name, placeholder)
        yield
    finally:
        for name, module in before.items():
            replace(model, name, module)
        for module in training:
            module.training = True


@cache
def register_placeholder() -> None:
    """Registers the placeholder as an operator that torch's TorchScript exporter can write."""
    from torch.onnx.symbolic_helper import parse_args

    @parse_args("v", "i", "i", "v")
    def symbolic(g: Any, x: Any, index: int, rank: int, shape: Any) -> Any:
        y = g.op(f"{DOMAIN}::{OPERATOR}", x, index_i=index, rank_i=rank)
        y.setType(x.type().with_sizes([None] * rank))
        return y

    name = f"{DOMAIN}::placeholder"
    torch.library.define(name, "(Tensor x, int index, int rank, int[] shape) -> Tensor")
    torch.library.impl(name, "CompositeExplicitAutograd", lambda x, index, rank, shape: x.new_zeros(shape))
    torch.onnx.register_custom_op_symbolic(name, symbolic, OPSET)


def is_placeholder(node: "NodeProto") -> bool:
    """Returns whether a node of a traced graph is a placeholder, which stands for an integer layer."""
    return bool((node.domain, node.op_type) == (DOMAIN, OPERATOR))


def attribute(node: "NodeProto", name: str) -> int:
    """Returns the integer attribute `name` of a placeholder node."""
    return next(entry.i for entry in node.attribute if entry.name == name)


def bodies(proto: "ModelProto") -> Iterator[Any]:
    """Yields the list of nodes of each branch, loop body and function of a graph, including nested ones. The list of
    the graph's own nodes, outside of all bodies, is not yielded."""
    waiting = [*(function.node for function in proto.functions), *_inner(proto.graph.node)]
    while waiting:
        nodes = waiting.pop()
        yield nodes
        waiting.extend(_inner(nodes))


def _inner(nodes: Any) -> list[Any]:
    entries = [entry for node in nodes for entry in node.attribute]
    return [graph.node for entry in entries for graph in ([entry.g] if entry.HasField("g") else entry.graphs)]
