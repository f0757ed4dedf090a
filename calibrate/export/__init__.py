"""Writing what was calibrated. One file here for each format; all hold the same integers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import nn

from capture.files import Modes, create

from ..errors import CalibrateError
from ..layers import QuantizedLayer
from ..onnx.extra import check_extra
from .ascend import write_ascend
from .target import check_target, write_directory

if TYPE_CHECKING:
    from ..run import Result

__all__ = ["EXPORTS", "REPORT_FILE", "check_formats", "check_target", "export"]

REPORT_FILE = "report.json"


class Writer(Protocol):
    """Writes the files of one format into an existing directory."""

    def __call__(
        self,
        layers: Mapping[str, QuantizedLayer],
        model: nn.Module,
        directory: Path,
        modes: Modes,
        deployment: "Deployment",
    ) -> None: ...


class Deployment(NamedTuple):
    """What is known of where the checkpoint goes: the noise level of each denoising step, and a call of the model."""

    timesteps: Sequence[float] | None
    example: Any


def export(
    result: "Result",
    model: nn.Module,
    directory: Path | str,
    formats: tuple[str, ...] = ("ascend",),
    *,
    overwrite: bool = False,
    group_readable: bool = False,
    timesteps: Sequence[float] | None = None,
) -> Path:
    """Writes a checkpoint and report.json to `directory`, as a whole or not at all; returns its real path.

    `model` is the float one, or the one the layers are installed in. `timesteps` are what the deployment calls it with,
    one for each denoising step in its order: W8A8_TIMESTEP layers are written for these [default: those of `result`].

    Raises CaptureError: 2 for an unknown format and for timesteps that are no numbers, 5 for a target that cannot be
    used (see check_target), 6 for numbers that are not finite.
    """
    check_formats(formats)
    target = check_target(directory, overwrite=overwrite)
    modes = Modes(group_readable)
    deployment = Deployment(result.timesteps if timesteps is None else timesteps, result.example)

    def fill(staged: Path) -> None:
        for name in formats:
            EXPORTS[name](result.layers, model, staged, modes, deployment)
        with create(staged / REPORT_FILE, modes.manifest) as sink:
            sink.write(report_bytes(result.report))

    write_directory(target, fill, modes)
    return target


def check_formats(formats: Sequence[str]) -> None:
    """Raises CalibrateError 2 for a format that is unknown, or that wants packages which are not installed."""
    for name in formats:
        if name not in EXPORTS:
            raise CalibrateError(f"format: no '{name}'. Choose one of {', '.join(EXPORTS)}.", 2)
        if name.endswith("onnx"):
            check_extra(f"format {name}")


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """The report as a file holds it."""
    return (json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _ascend(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    write_ascend(layers, model, directory, modes, timesteps=deployment.timesteps)


def _onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    from ..onnx.write import write_qdq  # it imports from here

    write_qdq(layers, model, directory, modes, deployment.example)


def _ascend_onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    from ..onnx.write import write_ascend_onnx

    write_ascend_onnx(layers, model, directory, modes, deployment.example)


EXPORTS: dict[str, Writer] = {"ascend": _ascend, "onnx": _onnx, "ascend-onnx": _ascend_onnx}
