"""Writes the result of a calibration as a checkpoint in one or several formats, all with the same integers."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes, create, make_directory
from octavo.capture.fingerprint import Origin
from octavo.capture.space import check_space

from ..byte_sizes import parse_size
from ..layers.schemes import NAMES, ROTATIONS, Instead
from ..report_file import REPORT_FILE, report_bytes
from ..result import Result
from . import TABLE, format_named
from .attention import with_attention, written_rows
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
    """Writes a checkpoint with report and manifest to `directory`, completely or not at all; returns its absolute path.

    `model` may be the float model, or have the layers of `result`. A format that cannot share a directory with an
    earlier one of `formats` gets a subfolder. `overwrite` replaces a checkpoint in `directory`. `group_readable` lets
    the user's group read the files. `files` are further files, a dict from name to content. `max_shard_size`, in bytes
    or as "5GB", is the largest size of a weight file. `origin` is the fingerprint of the float model; None: computed
    from `model`. Raises UsageError for an unknown format or size, a model that a format cannot hold, or folded
    smoothing factors that the software for a format would not load; StorageError if `directory` cannot be written;
    NumbersError for NaN or Inf.
    """
    result = _checked(model, result, formats)
    shard = max_shard_size if isinstance(max_shard_size, int) else int(parse_size(max_shard_size, "max_shard_size"))
    target, modes = check_target(directory, overwrite=overwrite), Modes(group_readable)
    check_space(directory, least_size(model, result.layers, len(formats)))
    deployment = Deployment(result.timesteps, result.example, result.parameters, result.axes, shard, {})

    def fill(staged: Path) -> None:
        for name in formats:
            folder = staged / folder_for(name, formats)
            if folder != staged:
                make_directory(folder, modes.directory)
            rows = written_rows(format_named(name), model, result.attention)
            format_named(name).write(result.layers, model, folder, modes, deployment._replace(attention=rows))
        _write_beside(staged, {REPORT_FILE: report_bytes(result.report), **(files or {})}, modes)
        write_manifests(staged, modes, origin or origin_of(model))

    write_directory(target, fill, modes)
    return target


def _write_beside(staged: Path, files: Mapping[str, bytes], modes: Modes) -> None:
    for name, data in files.items():
        with create(staged / name, modes.manifest) as sink:
            sink.write(data)


def weight_scales_for(formats: Sequence[str], scheme: str, chosen: str | None) -> str:
    """Returns the value of `Settings.weight_scales` for layers of `scheme`: `chosen` if it is not None; otherwise
    "tensor" if one of `formats` needs one scale for a whole weight, and "channel" if none does. Raises UsageError if a
    format cannot hold what was chosen."""
    needing = [name for name in formats if scheme in format_named(name).whole]
    if needing and chosen == "channel":
        fact = f"holds one scale for a whole weight of {scheme}"
        raise UsageError(f"--weight-scales channel: format {needing[0]} {fact}. Remove --weight-scales.")
    return chosen or ("tensor" if needing else "channel")


def mixable(formats: Sequence[str]) -> tuple[str, ...]:
    """Returns the schemes that layers of one checkpoint may have beside each other in each of `formats`; () if a format
    holds only one scheme at a time."""
    first, *rest = map(format_named, formats)
    if not all(record.mixed for record in (first, *rest)):
        return ()
    return tuple(scheme for scheme in first.schemes if all(scheme in record.schemes for record in rest))


def instead_of(formats: Sequence[str], element: str, activations: str) -> tuple[Instead, ...]:
    """Returns the ways to quantize a layer that its own scheme would lose: with a scale for each token of its input, or
    for each block of a token in MXFP8, and with or without a rotation of the input. Only ways that all of `formats` can
    hold are returned. `element` and `activations`, values of these fields of `Settings`, stand for the layer's own
    scheme."""
    scheme = NAMES[element]["dynamic"]
    if scheme != NAMES[element][activations] and scheme not in mixable(formats):
        return ()
    rotations = ROTATIONS if all("Rotate" in format_named(name).transforms_of(scheme) for name in formats) else ()
    ways = (Instead(scheme), *(Instead(scheme, size) for size in rotations))
    return tuple(way for way in ways if way != Instead(NAMES[element][activations]))


def check_rotation(formats: Sequence[str], rotation: str, scheme: str = "") -> None:
    """Raises UsageError if inputs of layers may be rotated and one of `formats` cannot hold such layers of this
    `scheme`; "" stands for one of integers. `rotation` is a value of `Settings.rotation`; "off" means that no input is
    rotated, so nothing is raised."""
    for name in formats:
        if rotation != "off" and "Rotate" not in format_named(name).transforms_of(scheme):
            able = ", ".join(word for word in TABLE if "Rotate" in format_named(word).transforms_of(scheme))
            fact = f"format {name} cannot hold {scheme and scheme + ' '}layers with rotated inputs"
            raise UsageError(
                f"--rotation {rotation}: {fact}. Use {f'--format {able}, or ' if able else ''}--rotation off."
            )


def folding(formats: Sequence[str]) -> bool:
    """Returns whether smoothing factors may be folded into float parameters: True if the software that loads each of
    `formats` takes the float parameters from the checkpoint."""
    return all(format_named(name).folds for name in formats)


def check_model(formats: Sequence[str], model: nn.Module, dtype: str | None = None) -> None:
    """Raises UsageError if one of `formats` cannot hold a denoiser of the class, configuration and dtype of `model`.

    `dtype` is the dtype in which the denoiser will run, such as "bfloat16"; None: that of `model`.
    """
    config = getattr(model, "config", None)
    config = config if isinstance(config, Mapping) else {}
    dtype = dtype or str(getattr(model, "dtype", "")).removeprefix("torch.")
    for record in map(format_named, formats):
        if refusal := record.refusal(type(model).__name__, config):
            raise UsageError(f"format {record.name}: {refusal}")
        if record.dtypes and dtype not in record.dtypes:
            fact = f"{record.consumer} runs in {' or '.join(record.dtypes)}, and the model is in {dtype}"
            raise UsageError(f"format {record.name}: {fact}. Use --dtype {record.dtypes[0]}.")


def kept_float(formats: Sequence[str], model: nn.Module, names: Collection[str], scheme: str = "") -> dict[str, str]:
    """Returns a dict from layer name to reason. It has those layers of `names` that the software for one of `formats`
    can only hold as float. `names` are the layers of `model` that would otherwise become 8-bit layers of `scheme`. If
    `scheme` is "", layers that stay float only in some schemes may be missing."""
    reasons: dict[str, str] = {}
    count = -1
    while len(reasons) > count:  # a layer that stays float for one format may keep others float in another
        count = len(reasons)
        for record in map(format_named, formats):
            left = [name for name in names if name not in reasons]
            reasons |= dict.fromkeys(
                record.kept_float(model, left, scheme), f"{record.consumer} can only hold it as float"
            )
    return reasons


def joined(formats: Sequence[str], model: nn.Module, names: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Returns groups of those layers `names` of `model` whose weights need one scale together, because a consumer of
    one of `formats` joins them into one matrix. Groups with a layer in common become one group."""
    groups: list[set[str]] = []
    for record in map(format_named, formats):
        for group in record.joined(model, names):
            merged = set(group) & set(names)
            overlapping = [other for other in groups if other & merged]
            groups = [other for other in groups if not other & merged]
            groups.append(merged.union(*overlapping))
    return tuple(tuple(sorted(group)) for group in groups if len(group) > 1)


def multiplying(formats: Sequence[str], scheme: str = "") -> bool:
    """Returns whether layers of this `scheme` may multiply their inputs by smoothing multipliers: True if each of
    `formats` can hold the multipliers. "" stands for a scheme of integers."""
    return all("Multiply" in format_named(name).transforms_of(scheme) for name in formats)


def _checked(model: nn.Module, result: Result, formats: Sequence[str]) -> Result:
    """Returns `result` with a report that says which types of attention are written. Raises UsageError for unknown
    formats, and for a model, folded parameters or attention that a format cannot hold."""
    check_formats(formats)
    check_model(formats, model)
    unfit = [name for name in formats if not format_named(name).folds]
    if result.parameters and unfit:
        fact = "its software loads no float parameters, but smoothing factors were folded into some of them"
        raise UsageError(f"format {unfit[0]}: {fact}. Calibrate with Settings(fold=False).")
    return with_attention(result, model, formats)


def folder_for(name: str, formats: Sequence[str]) -> str:
    """Returns the folder that the format `name` is written into, relative to the checkpoint's directory: "." for the
    directory itself, or `name`.

    A format gets a subfolder if it stands behind another format in `formats` and both cannot share a directory: because
    both have files of the same names, or because the software that loads one of them would also load the weight files
    of the other.
    """
    record, before = format_named(name), [format_named(other) for other in formats[: list(formats).index(name)]]
    shared = any(other.files == record.files or other.alone or record.alone for other in before)
    return name if shared else "."


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for a format that is unknown or listed twice, or whose packages are not installed."""
    for name in formats:
        if name not in TABLE:
            raise UsageError(f"format: there is no format '{name}'. Choose one of {', '.join(TABLE)}.")
        if formats.count(name) > 1:
            raise UsageError(f"format: '{name}' is listed twice. List it once.")
        check_packages(f"format {name}", format_named(name).packages, format_named(name).extra)


def check_scheme(formats: Sequence[str], element: str, activations: str) -> None:
    """Raises UsageError if one of `formats` cannot hold layers of the scheme that `element` and `activations` stand for
    together, values of these fields of `Settings`. "fp8" and "dynamic", for example, stand for W8A8_FP8_DYNAMIC."""
    for name in formats:
        schemes = format_named(name).schemes
        if NAMES[element][activations] in schemes:
            continue
        elements = [word for word, ways in NAMES.items() if set(ways.values()) & set(schemes)]
        if element not in elements:
            holders = [other for other in TABLE if NAMES[element][activations] in format_named(other).schemes]
            remedy = f"--format {' or '.join(holders)}, or --element {' or '.join(elements)}"
            raise UsageError(f"format {name}: cannot hold {element}. Use {remedy}.")
        layers = "weight-only layers" if activations == "float" else f"layers with {activations} activations"
        instead = next(way for scheme in schemes for way, word in NAMES[element].items() if word == scheme)
        remedy = "--weight-only" if instead == "float" else f"--activations {instead}"
        codes = "" if element == "int8" else f" in {element}"
        raise UsageError(f"format {name}: cannot hold {layers}{codes}. Use {remedy}.")
