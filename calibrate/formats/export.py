"""Writing what was calibrated, in one or several formats: all hold the same integers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes, create, make_directory
from octavo.capture.fingerprint import Origin
from octavo.capture.space import check_space

from ..byte_sizes import parse_size
from ..layers.inputs import ACTIVATIONS, WORDS
from ..report_file import REPORT_FILE, report_bytes
from ..result import Result
from . import TABLE, format_named
from .diffusers.write import SHARD
from .manifest import write_manifests
from .origin import origin_of
from .packages import check_packages
from .record import Deployment
from .target import check_target, least_size, write_directory


def export(
    result: Result,
    model: nn.Module,
    directory: Path | str,
    formats: tuple[str, ...] = ("ascend",),
    *,
    overwrite: bool = False,
    group_readable: bool = False,
    files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str = SHARD,
    origin: Origin | None = None,
) -> Path:
    """Writes a checkpoint, report and manifest to `directory`, as a whole or not at all; returns its real path.

    `model` is the float one, or the one the layers are installed in. Layers with ranges by noise level are written for
    the timesteps of `result`. A format goes into a folder of its name where an earlier one has the same files. More
    weights than `max_shard_size`, in bytes or as "5GB", become several files. `files` are written beside the
    checkpoint, by name. The manifest names `origin` as the float model, by default `model`.

    Raises UsageError for an unknown format or size, and where smoothing was folded into float parameters that the
    consumer of a format would not load; StorageError as check_target, NumbersError for numbers that are not finite.
    """
    check_formats(formats)
    _check_parameters(result, formats)
    shard = max_shard_size if isinstance(max_shard_size, int) else int(parse_size(max_shard_size, "max_shard_size"))
    target, modes = check_target(directory, overwrite=overwrite), Modes(group_readable)
    deployment = Deployment(result.timesteps, result.example, result.parameters, result.axes, shard)
    check_space(directory, least_size(model, result.layers, len(formats)))

    def fill(staged: Path) -> None:
        for name in formats:
            folder = staged / place_of(name, formats)
            if folder != staged:
                make_directory(folder, modes.directory)
            format_named(name).write(result.layers, model, folder, modes, deployment)
        _write_beside(staged, {REPORT_FILE: report_bytes(result.report), **(files or {})}, modes)
        write_manifests(staged, modes, origin or origin_of(model))

    write_directory(target, fill, modes)
    return target


def _write_beside(staged: Path, files: Mapping[str, bytes], modes: Modes) -> None:
    """Writes files beside the formats, by name."""
    for name, data in files.items():
        with create(staged / name, modes.manifest) as sink:
            sink.write(data)


def folding(formats: Sequence[str]) -> bool:
    """Whether the consumers of all `formats` load float parameters from the files."""
    return all(format_named(name).folds for name in formats)


def _check_parameters(result: Result, formats: Sequence[str]) -> None:
    unfit = [name for name in formats if not format_named(name).folds]
    if result.parameters and unfit:
        raise UsageError(f"format {unfit[0]}: takes no float parameters. Calibrate without Settings.fold.")


def place_of(name: str, formats: Sequence[str]) -> str:
    """Where in the directory a format goes: into a folder of its name if one before it has the same files."""
    before = formats[: list(formats).index(name)]
    return name if format_named(name).files in {format_named(other).files for other in before} else "."


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for a format that is unknown or asked for twice, or whose packages are not installed."""
    for name in formats:
        if name not in TABLE:
            raise UsageError(f"format: no '{name}'. Choose one of {', '.join(TABLE)}.")
        if formats.count(name) > 1:
            raise UsageError(f"format: '{name}' is asked for twice. Give it once.")
        check_packages(f"format {name}", format_named(name).packages, format_named(name).extra)


def check_activations(formats: Sequence[str], activations: str) -> None:
    """Raises UsageError for a format that has no form for layers with `activations`, a word of settings."""
    for name in formats:
        known = format_named(name).schemes
        if WORDS[ACTIVATIONS[activations]] not in known:
            what = "weights alone" if activations == "float" else f"{activations} activations"
            instead = next(word for word, kind in ACTIVATIONS.items() if WORDS[kind] == known[0])
            raise UsageError(f"format {name}: has no form for {what}. Use --activations {instead}.")
