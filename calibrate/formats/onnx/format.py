"""The records of the formats `onnx` and `ascend-onnx`. Importing this module does not need onnx."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from octavo.capture.files import Modes

from ...layers.inputs import FloatInput, StaticInput
from ...layers.modules import QuantizedLayer
from ...layers.transforms import Multiply
from ..record import Deployment, Format
from .packages import EXTRA, PACKAGES


def write_onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes the graph that onnxruntime runs."""
    from .write import write_qdq

    write_qdq(layers, model, directory, modes, deployment.example)


def write_ascend_onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes the graph that Ascend's compiler takes."""
    from .write import write_ascend_onnx

    write_ascend_onnx(layers, model, directory, modes, deployment.example)


FORMATS = (
    Format(
        name="onnx",
        files=r"model_quant_qdq\.onnx(\.data)?",
        writer=write_onnx,
        transforms=(Multiply,),
        inputs=(StaticInput, FloatInput),
        packages=PACKAGES,
        extra=EXTRA,
    ),
    Format(
        name="ascend-onnx",
        files=r"model_quant\.onnx(\.data)?",
        writer=write_ascend_onnx,
        transforms=(Multiply,),
        inputs=(StaticInput,),
        packages=PACKAGES,
        extra=EXTRA,
    ),
)
