"""Traces a model to an ONNX graph in which each integer layer is one node, a placeholder with the layer's number.

torch.onnx's exporter traces the model while placeholders replace the layers. What a layer does to its input before
quantizing it (the smoothing multiplier, padding other than zeros) becomes nodes before the placeholder.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from octavo.capture.errors import MisfitError, UsageError

from ...layers.modules import QuantizedLayer
from .placeholders import (
    DOMAIN,
    KEEP_FLOAT,
    OPSET,
    Placeholder,
    attribute,
    bodies,
    is_placeholder,
    placeholders_installed,
    register_placeholder,
)

if TYPE_CHECKING:
    from onnx import ModelProto

# warnings of the TorchScript exporter that it wrote a value as a constant although it depends on the input
_CONSTANT_WARNING = r".*(NumPy|numpy|Python (list|float|number|integer)).*"
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")  # that log while a model is exported


@contextmanager
def _silenced() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _dynamo_export(model: nn.Module, args: Any, kwargs: Any, names: list[str]) -> "ModelProto":
    auto = torch.export.Dim.AUTO

    def first_axis(x: Any) -> Any:
        return {0: auto} if isinstance(x, Tensor) and x.ndim else None

    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: tree_map(first_axis, value) for name, value in arguments.items()}
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, input_names=names, dynamic_shapes=shapes,
        verbose=False, external_data=False,
    )  # fmt: skip
    assert program is not None
    return program.model_proto


def _torchscript_export(model: nn.Module, args: Any, kwargs: Any, names: list[str]) -> "ModelProto":
    from io import BytesIO

    import onnx

    register_placeholder()
    domains = {DOMAIN: 1} if any(isinstance(module, Placeholder) for module in model.modules()) else {}
    warnings.filterwarnings("error", _CONSTANT_WARNING, torch.jit.TracerWarning)
    buffer = BytesIO()
    torch.onnx.export(
        model, (*args, kwargs) if kwargs else args, buffer, dynamo=False,  # type: ignore[arg-type]
        opset_version=OPSET, input_names=names, dynamic_axes={name: {0: "batch"} for name in names},
        custom_opsets=domains,
    )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


Exporter = Callable[[nn.Module, Any, Any, list[str]], "ModelProto"]
EXPORTERS: tuple[Exporter, ...] = (_dynamo_export, _torchscript_export)  # in the order in which they are tried


def trace(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    example: Any,
    input_names: Sequence[str] | None = None,
    exporters: Sequence[Exporter] = EXPORTERS,
) -> "ModelProto":
    """Traces `model` to a graph in which each of `layers` is a placeholder node, numbered in the order of `layers`.

    `example` is the call of the model to trace, with args and kwargs. Its tensors are the inputs of the graph.
    `input_names` are their names; None stands for input.1, input.2 and so on. The first axis of an input may have any
    length, unless the model fixes the length. `exporters` are tried one after the other until one succeeds.

    Raises UsageError unless there is a different name for each input, MisfitError for a model that no exporter can
    export and for a layer that the call does not reach.
    """
    args, kwargs = _with_two_rows((tuple(example.args), dict(example.kwargs)))
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
    names = list(input_names) if input_names else [f"input.{number}" for number in range(1, count + 1)]
    if len(names) != count or len(set(names)) != count:
        raise UsageError(f"input_names: {names} do not name the model's {count} inputs. Give each input its own name.")
    failures = []
    for exporter in exporters:
        try:
            torchscript = exporter is _torchscript_export
            with torch.no_grad(), _silenced(), placeholders_installed(model, layers, torchscript):
                proto = exporter(model, args, kwargs, names)
            break
        except Exception as error:  # the exporters' errors have no common class
            failures.append(error)
    else:
        fact = _cause(failures[0])
        kind = type(model).__name__
        remedy = "Use the format ascend."
        raise MisfitError(f"{kind}: torch.onnx cannot export this model ({fact}). {remedy}") from failures[0]
    _check_reached(proto, layers)
    return proto


def _cause(error: BaseException) -> str:
    """Returns the text of the original error, at the end of the chain of causes of `error`, in one line of at most 200
    characters.

    The exporters raise errors of their own from the original one, and add advice and terminal colours to its text.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:200] or type(error).__name__


def _with_two_rows(call: Any) -> Any:
    """Returns a copy of `call`, the arguments of a call, so that tracing does not change the original tensors. In the
    copy, each tensor whose first axis has length 1 is repeated to length 2, because exporters would write a length of 1
    into the graph as a constant."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.cat([x, x]) if x.ndim and len(x) == 1 else x.clone()

    return tree_map(copied, call)


def _check_reached(proto: "ModelProto", layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises MisfitError for a layer that the traced graph does not run, or runs inside a branch or loop."""
    indices = {attribute(node, "index") for node in proto.graph.node if is_placeholder(node)}
    inner = {attribute(node, "index") for body in bodies(proto) for node in body if is_placeholder(node)}
    for index, name in enumerate(layers):
        if index in inner:
            raise MisfitError(f"{name}: is in a branch or loop of the graph. {KEEP_FLOAT}")
        if index not in indices:
            raise MisfitError(f"{name}: is not in the traced graph. Give a call that reaches the layer. {KEEP_FLOAT}")
