"""Traces a model to an ONNX graph in which each integer layer is one node, a placeholder with the layer's number.

torch.onnx's exporter traces the model while placeholders stand in the places of the layers. The steps of a layer before
its quantization (smoothing, padding other than zeros) are traced with the placeholder.
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
from .placeholders import DOMAIN, OPSET, Mark, attribute, bodies, define_older_mark, is_mark, marked

if TYPE_CHECKING:
    from onnx import ModelProto

# warnings of the older exporter that it made a constant of a value which depends on the input
_BAKED = r".*(NumPy|numpy|Python (list|float|number|integer)).*"
_LOUD = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' logs and warnings while inside."""
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

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: tree_map(first_axis, value) for name, value in given.items()}
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, input_names=names, dynamic_shapes=shapes,
        verbose=False, external_data=False,
    )  # fmt: skip
    assert program is not None
    return program.model_proto


def _older(model: nn.Module, args: Any, kwargs: Any, names: list[str]) -> "ModelProto":
    from io import BytesIO

    import onnx

    define_older_mark()
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
    """Traces `model` to a graph; the layers are placeholders, numbered in their order. The first axis of the inputs
    stays open where the model allows it.

    `example` is a call of the model (args, kwargs); its tensors are the inputs, by default input.1, input.2, ... Raises
    UsageError for another number of names, MisfitError for a model that neither exporter takes and for a layer that the
    call does not reach.
    """
    args, kwargs = _widened((tuple(example.args), dict(example.kwargs)))
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
    names = list(input_names) if input_names else [f"input.{at + 1}" for at in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise UsageError(f"input_names: {names} for {count} inputs. Give one name for each.")
    failures = []
    for exporter in exporters:
        try:
            with torch.no_grad(), _quiet(), marked(model, layers, older=exporter is _older):
                proto = exporter(model, args, kwargs, names)
            break
        except Exception as error:  # the exporters' errors have no common class
            failures.append(error)
    else:
        fact = _cause(failures[0])
        raise MisfitError(f"{type(model).__name__}: torch.onnx cannot export it ({fact}).") from failures[0]
    _check_reached(proto, layers)
    return proto


def _cause(error: BaseException) -> str:
    """The first cause of an error, in one line: exporters wrap the cause in advice and terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:200] or type(error).__name__


def _widened(call: Any) -> Any:
    """A copy of the call, which tracing may change, with two rows in place of one: exporters take an axis of length 1
    for a constant."""

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.cat([x, x]) if x.ndim and len(x) == 1 else x.clone()

    return tree_map(widened, call)


def _check_reached(proto: "ModelProto", layers: Mapping[str, QuantizedLayer]) -> None:
    found = {attribute(node, "index") for node in proto.graph.node if is_mark(node)}
    inside = {attribute(node, "index") for body in bodies(proto) for node in body if is_mark(node)}
    for index, name in enumerate(layers):
        if index in inside:
            raise MisfitError(f"{name}: is in a branch or loop of the graph. Keep it float.")
        if index not in found:
            raise MisfitError(f"{name}: not in the traced graph. Keep it float, or give a call that reaches it.")
