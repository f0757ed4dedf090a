"""A model as an ONNX graph in which each integer layer is one node, a mark that says which layer it is.

torch.onnx's exporter traces the model while marks stand in the places of the layers. What a layer does before it
quantizes (smoothing, padding that is not zeros) is traced with it.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import CalibrateError
from ..layers import QuantizedConv2d, QuantizedLayer, names_of, replace

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DOMAIN, MARK = "octavo", "Layer"
OPSET = 18
_BAKED = r".*(NumPy|numpy|Python (list|float|number|integer)).*"  # what the older exporter makes a constant of
_LOUD = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Mark(nn.Module):
    """Stands for layer number `index`; puts out a tensor of the shape, dtype and device that the layer would."""

    mul_scale: Tensor | None

    def __init__(self, index: int, layer: QuantizedLayer, older: bool) -> None:
        super().__init__()
        self.index, self.older = index, older
        self.outputs, *self.size = layer.weight.shape[0], *layer.weight.shape[2:]
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
        """The shape of what the layer puts out for `x`, which has the padding that is not zeros."""
        if self.geometry is None:
            return (*x.shape[:-1], self.outputs)
        left, right, top, bottom = self.geometry.padding if self.geometry.padding_mode == "zeros" else (0, 0, 0, 0)
        lengths = x.shape[-2] + top + bottom, x.shape[-1] + left + right
        moves = zip(lengths, self.size, self.geometry.stride, self.geometry.dilation, strict=True)
        places = [(length - dilation * (size - 1) - 1) // stride + 1 for length, size, stride, dilation in moves]
        return (x.shape[0], self.outputs, *places)


@contextmanager
def _marked(model: nn.Module, layers: Mapping[str, QuantizedLayer], older: bool) -> Iterator[None]:
    """Inside, `model` is in evaluation and has marks for the layers; afterwards it is what it was."""
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _newer(model: nn.Module, args: Any, kwargs: Any, names: list[str]) -> "ModelProto":
    auto = torch.export.Dim.AUTO

    def first_axis(x: Any) -> Any:
        return {0: auto} if isinstance(x, Tensor) and x.ndim else None

    # a mapping by parameter names would be wanted for kwargs alone; a tuple for args alone
    shapes = tree_map(first_axis, kwargs) if kwargs and not args else tree_map(first_axis, args)
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, input_names=names, dynamic_shapes=shapes,
        verbose=False, external_data=False,
    )  # fmt: skip
    assert program is not None
    return program.model_proto


@cache
def _define_older_mark() -> None:
    """The mark as an operator of torch, which the older exporter knows how to write."""
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


def _older(model: nn.Module, args: Any, kwargs: Any, names: list[str]) -> "ModelProto":
    from io import BytesIO

    import onnx

    _define_older_mark()
    domains = {DOMAIN: 1} if any(isinstance(module, Mark) for module in model.modules()) else {}
    warnings.filterwarnings("error", _BAKED, torch.jit.TracerWarning)
    buffer = BytesIO()
    torch.onnx.export(
        model, (*args, kwargs) if kwargs else args, buffer, dynamo=False,  # type: ignore[arg-type]
        opset_version=OPSET, input_names=names, dynamic_axes={name: {0: "batch"} for name in names},
        custom_opsets=domains,
    )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


Exporter = Callable[[nn.Module, Any, Any, list[str]], "ModelProto"]
EXPORTERS: tuple[Exporter, ...] = (_newer, _older)


def trace(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    example: Any,
    input_names: Sequence[str] | None = None,
    exporters: Sequence[Exporter] = EXPORTERS,
) -> "ModelProto":
    """The graph of `model`; the layers are marks, numbered in their order. The first axis of the inputs stays open
    where the model lets it.

    `example` is a call of the model (args, kwargs); its tensors are the inputs, by default input.1, input.2, ...
    Raises CalibrateError: 2 for another number of names, 4 for a model that neither exporter takes and for a layer that
    the call does not reach.
    """
    args, kwargs = _widened((tuple(example.args), dict(example.kwargs)))
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
    names = list(input_names) if input_names else [f"input.{at + 1}" for at in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise CalibrateError(f"input_names: {names} for {count} inputs. Give one name for each.", 2)
    failures = []
    for exporter in exporters:
        try:
            with torch.no_grad(), _quiet(), _marked(model, layers, older=exporter is _older):
                proto = exporter(model, args, kwargs, names)
            break
        except Exception as error:  # each fails in ways of its own
            failures.append(error)
    else:
        fact = " ".join(str(failures[0]).split())[:200]
        raise CalibrateError(f"{type(model).__name__}: torch.onnx cannot export it ({fact}).", 4) from failures[0]
    _check_reached(proto, layers)
    return proto


def _widened(call: Any) -> Any:
    """The call with two rows in the place of one: exporters take an axis of length 1 for a constant."""
    return tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x, call)


def is_mark(node: "NodeProto") -> bool:
    """Whether the node stands for a layer."""
    return bool((node.domain, node.op_type) == (DOMAIN, MARK))


def attribute(node: "NodeProto", name: str) -> int:
    """A number that a mark carries."""
    return next(each.i for each in node.attribute if each.name == name)


def _check_reached(proto: "ModelProto", layers: Mapping[str, QuantizedLayer]) -> None:
    found = {attribute(node, "index") for node in proto.graph.node if is_mark(node)}
    inside = {attribute(node, "index") for body in bodies(proto) for node in body if is_mark(node)}
    for index, name in enumerate(layers):
        if index in inside:
            raise CalibrateError(f"{name}: is in a branch or loop of the graph. Keep it float.", 4)
        if index not in found:
            raise CalibrateError(f"{name}: not in the traced graph. Keep it float, or give a call that reaches it.", 4)


def bodies(proto: "ModelProto") -> Iterator[Any]:
    """The nodes of each branch, loop and function."""
    waiting = [*(function.node for function in proto.functions), *_inner(proto.graph.node)]
    while waiting:
        nodes = waiting.pop()
        yield nodes
        waiting.extend(_inner(nodes))


def _inner(nodes: Any) -> list[Any]:
    found = [each for node in nodes for each in node.attribute]
    return [graph.node for each in found for graph in ([each.g] if each.HasField("g") else each.graphs)]
