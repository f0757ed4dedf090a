"""Defines the `Format` objects of the formats `onnx` and `ascend-onnx`. Importing this module needs neither onnx nor
torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import STATIC, WEIGHT_ONLY
from ..record import Deployment, Format
from .packages import EXTRA, PACKAGES

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write_onnx(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes the graph of format `onnx`, for onnxruntime and OpenVINO, into `directory`: `model` with the integer
    `layers` in it, traced on the example call in `deployment`. `modes` has the permissions of new files."""
    from .write import write_qdq

    write_qdq(layers, model, directory, modes, deployment.example)


def write_ascend_onnx(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes the graph of format `ascend-onnx`, for Ascend's compiler, into `directory`: `model` with the integer
    `layers` in it, traced on the example call in `deployment`. `modes` has the permissions of new files."""
    from .write import write_ascend_onnx

    write_ascend_onnx(layers, model, directory, modes, deployment.example)


FORMATS = (
    Format(
        name="onnx",
        files=r"model_quant_qdq\.onnx(\.data)?",
        writer=write_onnx,
        transforms=("Multiply",),
        schemes=(STATIC, WEIGHT_ONLY),
        packages=PACKAGES,
        extra=EXTRA,
    ),
    Format(
        name="ascend-onnx",
        files=r"model_quant\.onnx(\.data)?",
        writer=write_ascend_onnx,
        transforms=("Multiply",),
        schemes=(STATIC,),
        packages=PACKAGES,
        extra=EXTRA,
    ),
)
