"""The options of `octavo calibrate`, and the settings of a calibration that follow from them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from octavo.calibrate.formats.export import check_activations, check_formats
from octavo.calibrate.settings import RECIPES, Settings
from octavo.capture.errors import UsageError
from octavo.pipelines.family import Family


@dataclass(frozen=True)
class CalibrateOptions:
    """The options of the command, by their names; `capture` is the model where `pipeline` is cnn."""

    capture: Path
    out: Path
    pipeline: str | None = None
    images: Path | None = None
    input_shape: str | None = None
    model: str | None = None
    component: str | None = None
    accuracy: str = "fast"
    observer: str | None = None
    sigma: float = 25.0
    symmetric: bool = False
    weight_only: bool = False
    activations: str | None = None
    smoothing: bool | None = None
    weights: tuple[str, ...] = ()
    bias_correction: bool | None = None
    keep_float: tuple[str, ...] = ()
    quantize_too: tuple[str, ...] = ()
    budget: str | None = None
    samples: int | None = None
    memory: str | None = None
    formats: str = "ascend"
    max_shard_size: str = "10GB"
    overwrite: bool = False
    allow_incomplete: bool = False
    allow_revision: bool = False
    config: Path | None = None
    device: str = "auto"
    dtype: str | None = None
    group_readable: bool = False
    trust_remote_code: bool = False


def settings_of(options: CalibrateOptions, family: Family, samples: int | None = None) -> Settings:
    """The recipe, and what the options say otherwise. Raises UsageError where a format has no form for it."""
    defaults = family.keep_float
    if options.quantize_too and defaults is not None:
        unknown = [pattern for pattern in options.quantize_too if pattern not in defaults]
        if unknown:
            known = ", ".join(defaults)
            raise UsageError(f"--quantize: '{unknown[0]}' is not kept float by default. Choose of {known}.")
        defaults = {pattern: why for pattern, why in defaults.items() if pattern not in options.quantize_too}
    quantize = options.quantize_too if defaults is None else ()
    if options.accuracy not in RECIPES:
        raise UsageError(f"--accuracy: no '{options.accuracy}'. Choose one of {', '.join(RECIPES)}.")
    said = {
        "observer": options.observer, "activations": "float" if options.weight_only else options.activations,
        "smoothing": options.smoothing, "weights": options.weights or None, "bias_correction": options.bias_correction,
    }  # fmt: skip
    chosen = RECIPES[options.accuracy] | {name: value for name, value in said.items() if value is not None}
    made = Settings(
        sigma=options.sigma, symmetric=options.symmetric, groups=family.groups, keep_float=options.keep_float,
        defaults=defaults, more_float=family.more_float, quantize=quantize, samples=samples, budget=options.budget,
        release=True, name="--keep-float", **chosen,
    )  # fmt: skip
    check_activations(formats_of(options), made.activations)
    return made


def formats_of(options: CalibrateOptions) -> tuple[str, ...]:
    """The formats wanted. Raises UsageError for one that cannot be written."""
    names = tuple(name.strip() for name in options.formats.split(","))
    check_formats(names)
    return names


def with_config(options: CalibrateOptions, given: set[str]) -> CalibrateOptions:
    """The options with what the config file says, where the command line says nothing."""
    if options.config is None:
        return options
    from .commands.config_file import read_config

    known = {field.name for field in fields(options)} - {"capture", "out", "config"}
    read = read_config(options.config)
    return replace(options, **{name: value for name, value in read.items() if name in known and name not in given})
