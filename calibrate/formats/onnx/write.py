"""Writes the ONNX files of a calibrated model: the graph for onnxruntime and OpenVINO, the graph for Ascend's compiler,
and the graph of the float model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes

from ...layers.modules import QuantizedLayer
from ..origin import origin_of
from .ascend_graph import ascend
from .files import LARGEST, write_graphs, write_model
from .graph_builder import float_graph
from .packages import check_extra
from .qdq_graph import qdq
from .trace import trace

ASCEND_FILE, QDQ_FILE, FLOAT_FILE = "{}_quant.onnx", "{}_quant_qdq.onnx", "{}_fp.onnx"
NAME = "model"  # the name of the model in the file names of formats `onnx` and `ascend-onnx`


def write_qdq(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, example: Any
) -> None:
    """Writes the file of format `onnx`, model_quant_qdq.onnx in `directory`. Its graph is that of `model` with the
    integer `layers` in place of the float layers. `modes` has the permissions of new files.

    Raises UsageError if `example`, the call to trace, is None, if onnx is not installed, and for a layer that is
    neither static W8A8 nor W8A16; MisfitError for a model that torch.onnx cannot export or a layer that the call does
    not reach; NumbersError for a weight scale outside float32 or a bias outside int32.
    """
    _check_example(example, "format onnx")
    write_model(qdq(trace(model, layers, example), layers), directory / QDQ_FILE.format(NAME), modes.data)


def write_ascend_onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, example: Any
) -> None:
    """Writes the file of format `ascend-onnx`, model_quant.onnx in `directory`. Its graph is that of `model` with the
    integer `layers` in place of the float layers. `modes` has the permissions of new files.

    Raises UsageError if `example`, the call to trace, is None, if onnx is not installed, and for a layer that is not
    static W8A8; MisfitError for a model that torch.onnx cannot export or a layer that the call does not reach;
    NumbersError for a bias outside int32.
    """
    _check_example(example, "format ascend-onnx")
    write_model(ascend(trace(model, layers, example), layers), directory / ASCEND_FILE.format(NAME), modes.data)


def write_all(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    target: Path,
    arch: str,
    example: Any,
    input_names: Sequence[str] | None = None,
    *,
    fuse_add: bool = True,
    save_fp: bool = False,
    largest: int = LARGEST,
) -> None:
    """Writes {arch}_quant.onnx, {arch}_quant_qdq.onnx and, with `save_fp`, {arch}_fp.onnx into the directory `target`.
    Creates `target` if it does not exist; files with other names stay.

    `example` is the call of the model to trace; `input_names` names its tensors in the graph. With `fuse_add`, a bias
    is an input of its Conv or Gemm, else an Add node. If the tensors of a graph have more than `largest` bytes
    together, the large ones are written to the path of the graph + ".data".

    Raises:
    - UsageError: an `arch` that cannot begin a file name; no `example`; onnx is not installed; `input_names` that do
      not give each input a name of its own; a layer that is not static W8A8
    - MisfitError: a model that torch.onnx cannot export, or a layer that the call does not reach
    - NumbersError: a weight scale outside float32, or a bias outside int32
    - StorageError: `target` cannot be written
    """
    if not arch or Path(arch).name != arch or not arch.isprintable():
        raise UsageError(f"model_arch: {arch!r} cannot begin a file name. Give a name such as resnet50.")
    _check_example(example, "export_quant_onnx")
    modes = Modes()

    def fill(staged: Path) -> None:
        traced = trace(model, layers, example, input_names)
        write_model(ascend(traced, layers, fuse_add=fuse_add), staged / ASCEND_FILE.format(arch), modes.data, largest)
        write_model(qdq(traced, layers), staged / QDQ_FILE.format(arch), modes.data, largest)
        if save_fp:
            proto = float_graph(trace(model, {}, example, input_names))
            write_model(proto, staged / FLOAT_FILE.format(arch), modes.data, largest)

    write_graphs(target, fill, modes, arch, origin_of(model))


def _check_example(example: Any, what: str) -> None:
    check_extra(what)
    if example is None:
        raise UsageError(f"{what}: there is no input to trace the model with. Give calib_data or input_shape.")
