"""Writing what was calibrated. One file here for each format; all hold the same integers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes, create, make_directory

from ..byte_sizes import bytes_of
from ..layers.modules import QuantizedLayer
from .ascend.write import write_ascend
from .diffusers.write import SHARD, Groups, write_diffusers
from .onnx.packages import check_extra
from .target import check_target, write_directory
from .torchao.write import write_torchao

if TYPE_CHECKING:
    from ..result import Result

__all__ = ["EXPORTS", "REPORT_FILE", "check_activations", "check_formats", "check_target", "export"]

REPORT_FILE = "report.json"
_ACTIVATIONS = {"torchao": ("static", "dynamic", "float"), "onnx": ("static", "float"), "ascend-onnx": ("static",)}


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
    """What is known of the model and of where it goes: the noise level of each denoising step, a call of the model, the
    layers whose multipliers can go, how many axes the inputs of layers have, and the most bytes of a file."""

    timesteps: Sequence[float] | None
    example: Any
    groups: Groups | None
    axes: Mapping[str, int]
    shard: int


def export(
    result: "Result",
    model: nn.Module,
    directory: Path | str,
    formats: tuple[str, ...] = ("ascend",),
    *,
    overwrite: bool = False,
    group_readable: bool = False,
    timesteps: Sequence[float] | None = None,
    files: Mapping[str, bytes] | None = None,
    groups: Groups | None = None,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Writes a checkpoint and report.json to `directory`, as a whole or not at all; returns its real path. `files` are
    written beside them, by name.

    `model` is the float one, or the one the layers are installed in. `timesteps` are what the deployment calls it with,
    one for each denoising step in its order: W8A8_TIMESTEP layers are written for these [default: those of `result`].
    `groups` gives the layers of `model` whose multipliers can go, for formats that carry the float part too. A format
    with a file of a name that an earlier one has goes into a folder of its own name. Where weights are more than
    `max_shard_size`, bytes or a word like "5GB", diffusers and torchao have several files of at most that and an index.

    Raises UsageError for an unknown format, for timesteps that are no numbers and for a size that is none, StorageError
    for a target that cannot be used (see check_target), NumbersError for numbers that are not finite.
    """
    check_formats(formats)
    shard = max_shard_size if isinstance(max_shard_size, int) else int(bytes_of(max_shard_size, "max_shard_size"))
    target = check_target(directory, overwrite=overwrite)
    modes = Modes(group_readable)
    steps = result.timesteps if timesteps is None else timesteps
    deployment = Deployment(steps, result.example, groups, result.axes, shard)

    def fill(staged: Path) -> None:
        for name in formats:
            folder = staged / place_of(name, formats)
            if folder != staged:
                make_directory(folder, modes.directory)
            EXPORTS[name](result.layers, model, folder, modes, deployment)
        with create(staged / REPORT_FILE, modes.manifest) as sink:
            sink.write(report_bytes(result.report))
        for name, data in (files or {}).items():
            with create(staged / name, modes.manifest) as sink:
                sink.write(data)

    write_directory(target, fill, modes)
    return target


def place_of(name: str, formats: Sequence[str]) -> str:
    """Where in the directory a format goes: into a folder of its name if what comes before it has the same files."""
    alike = [each for each in formats if each in ("diffusers", "torchao")]
    return name if name in alike[1:] else "."


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for a format that is unknown or asked for twice, or whose packages are not installed."""
    for name in formats:
        if name not in EXPORTS:
            raise UsageError(f"format: no '{name}'. Choose one of {', '.join(EXPORTS)}.")
        if formats.count(name) > 1:
            raise UsageError(f"format: '{name}' is asked for twice. Give it once.")
        if name.endswith("onnx"):
            check_extra(f"format {name}")


def check_activations(formats: Sequence[str], activations: str) -> None:
    """Raises UsageError for a format that has no form for layers with `activations`, a word of settings."""
    for name in formats:
        known = _ACTIVATIONS.get(name, (activations,))
        if activations not in known:
            what = "weights alone" if activations == "float" else f"{activations} activations"
            raise UsageError(f"format {name}: has no form for {what}. Use --activations {known[0]}.")


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """The report as a file holds it."""
    return (json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _ascend(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    write_ascend(layers, model, directory, modes, timesteps=deployment.timesteps)


def _diffusers(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    write_diffusers(layers, model, directory, modes, groups=deployment.groups, shard=deployment.shard)


def _torchao(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    write_torchao(
        layers, model, directory, modes, groups=deployment.groups, axes=deployment.axes, shard=deployment.shard
    )


def _onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    from .onnx.write import write_qdq  # it imports from here

    write_qdq(layers, model, directory, modes, deployment.example)


def _ascend_onnx(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    from .onnx.write import write_ascend_onnx

    write_ascend_onnx(layers, model, directory, modes, deployment.example)


EXPORTS: dict[str, Writer] = {
    "ascend": _ascend, "diffusers": _diffusers, "torchao": _torchao, "onnx": _onnx, "ascend-onnx": _ascend_onnx
}  # fmt: skip
