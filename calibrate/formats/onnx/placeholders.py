"""Placeholders (class `Mark`) for the integer layers while a model is traced, in torch and in the graph."""

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

DOMAIN, MARK = "octavo", "Layer"
OPSET = 18  # version of the ONNX operators that the exporters write
_SIZES = (  # attributes of layers that models read, for example to pad for a stride
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups",
    "padding_mode",
)  # fmt: skip


class Mark(nn.Module):
    """Placeholder of layer number `index`: its output has the shape, dtype and device of the layer's output."""

    mul_scale: Tensor | None

    def __init__(self, index: int, layer: QuantizedLayer, older: bool) -> None:
        super().__init__()
        self.index, self.older = index, older
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
        if self.older:
            y = getattr(torch.ops, DOMAIN).mark(x, self.index, x.ndim, shape)
        else:
            numbers: dict[str, Any] = {"index": self.index, "rank": x.ndim}
            y = torch.onnx.ops.symbolic(f"{DOMAIN}::{MARK}", (x,), numbers, dtype=x.dtype, shape=shape, version=1)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def shape_of(self, x: Tensor) -> tuple[Any, ...]:
        """The shape of the layer's output for `x`, which already has any padding other than zeros."""
        if self.geometry is None:
            return (*x.shape[:-1], self.outputs)
        left, right, top, bottom = self.geometry.padding if self.geometry.padding_mode == "zeros" else (0, 0, 0, 0)
        lengths = x.shape[-2] + top + bottom, x.shape[-1] + left + right
        moves = zip(lengths, self.size, self.geometry.stride, self.geometry.dilation, strict=True)
        places = [(length - dilation * (size - 1) - 1) // stride + 1 for length, size, stride, dilation in moves]
        return (x.shape[0], self.outputs, *places)


@contextmanager
def marked(model: nn.Module, layers: Mapping[str, QuantizedLayer], older: bool) -> Iterator[None]:
    """Puts `model` in eval mode with placeholders for the layers while inside; afterwards the model is as before."""
    names = names_of(model)
    before = {name: model.get_submodule(name) for first in layers for name in names[first]}
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for index, (first, layer) in enumerate(layers.items()):
            mark = Mark(index, layer, older).eval()
            for name in names[first]:
                replace(model, name, mark)
        yield
    finally:
        for name, module in before.items():
            replace(model, name, module)
        for module in training:
            module.training = True


@cache
def define_older_mark() -> None:
    """Registers the placeholder as an operator of torch that the older exporter can write."""
    from torch.onnx.symbolic_helper import parse_args

    @parse_args("v", "i", "i", "v")
    def symbolic(g: Any, x: Any, index: int, rank: int, shape: Any) -> Any:
        y = g.op(f"{DOMAIN}::{MARK}", x, index_i=index, rank_i=rank)
        y.setType(x.type().with_sizes([None] * rank))
        return y

    name = f"{DOMAIN}::mark"
    torch.library.define(name, "(Tensor x, int index, int rank, int[] shape) -> Tensor")
    torch.library.impl(name, "CompositeExplicitAutograd", lambda x, index, rank, shape: x.new_zeros(shape))
    torch.onnx.register_custom_op_symbolic(name, symbolic, OPSET)


def is_mark(node: "NodeProto") -> bool:
    """Whether the node is the placeholder of a layer."""
    return bool((node.domain, node.op_type) == (DOMAIN, MARK))


def attribute(node: "NodeProto", name: str) -> int:
    """The integer attribute `name` of a placeholder's node."""
    return next(each.i for each in node.attribute if each.name == name)


def bodies(proto: "ModelProto") -> Iterator[Any]:
    """Yields the nodes of each branch, loop and function."""
    waiting = [*(function.node for function in proto.functions), *_inner(proto.graph.node)]
    while waiting:
        nodes = waiting.pop()
        yield nodes
        waiting.extend(_inner(nodes))


def _inner(nodes: Any) -> list[Any]:
    found = [each for node in nodes for each in node.attribute]
    return [graph.node for each in found for graph in ([each.g] if each.HasField("g") else each.graphs)]
