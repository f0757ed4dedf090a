"""Declares the options of `octavo calibrate` and `octavo calibrate-cnn`, and turns them into the settings of a
calibration."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.calibrate.layers.schemes import NAMES
from octavo.capture.errors import UsageError

from ..declarations import Within, argument, flag, option, several
from ..run_options import DEVICES, FILES, PLACE, READABLE, TRUST
from ..words import (
    ACTIVATIONS,
    ATTENTION,
    CLASSIFIER_FORMATS,
    DENOISER_FORMATS,
    DTYPES,
    ELEMENTS,
    OBSERVERS,
    RECIPES,
    ROTATION,
    WEIGHT_METHODS,
    WEIGHT_SCALES,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from octavo.calibrate.settings import Settings
    from octavo.pipelines.family import Family

INPUTS = "How inputs are rounded"
WEIGHTS = "How weights are rounded"
FLOAT = "What stays float"
REPORT = "What is reported"
CAPTURED = "The capture and its model"
OBSERVED_SIGMA = 25.0  # standard deviations: half width of the range of the sigma observer, msModelSlim's default
CLASSIFIERS = "Image classifiers (octavo calibrate-cnn has its own options)"


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """The options of `octavo calibrate`: the capture, how its model is quantized, and which files are written.

    If `pipeline` is cnn, `capture` is the directory of an image classifier.
    """

    capture: Path = argument()
    out: Path = argument()
    accuracy: str = option(
        "Recipe, from fast to accurate; the other options change parts of it.",
        default="fast", type=click.Choice(RECIPES),
    )  # fmt: skip
    activations: str | None = option(
        "One input range for each layer, noise bin, or token.", type=click.Choice(ACTIVATIONS),
    )  # fmt: skip
    element: str = option(
        "Number type of the codes.", default="int8", type=click.Choice(ELEMENTS),
    )  # fmt: skip
    keep_float: tuple[str, ...] = several(
        "Leave layers with a matching name float, such as 'proj_out' or '*.ff.*'; may be repeated.", metavar="PATTERN"
    )
    budget: str | None = option(
        "Choose schemes within a limit: 5MiB, 40% (of the bytes), 0.7x (of the time), or both.",
        metavar="LIMIT",
    )  # fmt: skip
    samples: int | None = option(
        "Replay only the N most different calls.", type=click.IntRange(1), metavar="N"
    )  # fmt: skip
    memory: str | None = option("Calibrate block by block with at most this much memory.", metavar="16GiB")
    device: str = option(DEVICES, default="auto", metavar="NAME")
    dtype: str | None = option(
        "Dtype in which the quantized model will run  [default: as captured]", type=click.Choice(DTYPES)
    )
    formats: str = option(
        f"Formats to write: {', '.join(DENOISER_FORMATS)}; separate several with commas.", "--format",
        default="ascend", metavar="NAMES",
    )  # fmt: skip
    overwrite: bool = flag("Replace OUT if it exists.")

    observer: str | None = option(
        "How the range of an input is chosen  [default: minmax]", heading=INPUTS, type=click.Choice(OBSERVERS)
    )
    sigma: float = option(
        "Half width of the range of --observer sigma, in standard deviations.",
        default=OBSERVED_SIGMA, heading=INPUTS, type=Within(0, 100), metavar="NUMBER",
    )  # fmt: skip
    symmetric: bool = flag("Quantize inputs without a zero point.", heading=INPUTS)
    smoothing: bool | None = option(
        "Move outliers of the inputs into the weights.", "--smoothing/--no-smoothing", heading=INPUTS
    )
    rotation: str = option(
        "Mix so many neighbouring channels of an input, against outliers; auto: the best for each layer.",
        default="off", heading=INPUTS, type=click.Choice(ROTATION),
    )  # fmt: skip
    attention: str = option(
        "Report the error of attention with quantized query, key and value; or write it where small.",
        default="off", heading=INPUTS, type=click.Choice(ATTENTION),
    )  # fmt: skip
    explain: bool = flag(
        "Show what causes the error of layers: rounding and clipping of inputs and weights.", heading=REPORT
    )
    weights: tuple[str, ...] = several(
        "Rounding method; if repeated, each layer gets the method with the least error.",
        heading=WEIGHTS, type=click.Choice(WEIGHT_METHODS),
    )  # fmt: skip
    weight_scales: str | None = option(
        "One scale for each output channel or for the whole weight  [default: as the formats need it]",
        heading=WEIGHTS, type=click.Choice(WEIGHT_SCALES),
    )  # fmt: skip
    bias_correction: bool | None = option(
        "Correct the mean error of each output in the bias.", "--bias-correction/--no-bias-correction", heading=WEIGHTS
    )
    weight_only: bool = flag("Quantize only the weights and leave inputs float (W8A16).", heading=FLOAT)
    quantize_too: tuple[str, ...] = several(
        "Quantize layers with a matching name that stay float by default; may be repeated.", "--quantize",
        heading=FLOAT, metavar="PATTERN",
    )  # fmt: skip
    model: str | None = option(
        "The captured model, if it is not where it was captured.", heading=CAPTURED, metavar="DIR"
    )
    component: str | None = option(
        "Quantize only this denoiser, if several were captured.", heading=CAPTURED, metavar="NAME"
    )
    allow_incomplete: bool = flag("Use a capture that is not finished.", heading=CAPTURED)
    allow_revision: bool = flag(
        "Accept a model whose weights differ from the captured model, if class and shapes are the same.",
        heading=CAPTURED,
    )  # fmt: skip
    trust_remote_code: bool = flag(TRUST, heading=PLACE)
    max_shard_size: str = option(
        "Largest weight file of the formats diffusers and torchao; more weights are split into several files.",
        default="10GB", heading=FILES, metavar="5GB",
    )  # fmt: skip
    group_readable: bool = flag(READABLE, heading=FILES)

    pipeline: str | None = option(
        "CAPTURE is the directory of an image classifier, or digits (bundled), instead of a capture.",
        heading=CLASSIFIERS, type=click.Choice(["cnn"]),
    )  # fmt: skip
    images: Path | None = option("Calibrate with the pictures in this directory.", heading=CLASSIFIERS, metavar="DIR")
    input_shape: str | None = option(
        "Calibrate without pictures, with generated inputs of this shape.", heading=CLASSIFIERS, metavar="1,3,224,224"
    )


# fields of CalibrateOptions that are no options of `octavo calibrate-cnn`
NOT_FOR_CLASSIFIERS = (
    "element", "weight_scales", "rotation", "attention", "pipeline", "model", "component", "budget", "quantize_too",
    "memory", "allow_incomplete", "allow_revision", "trust_remote_code", "max_shard_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(CalibrateOptions):
    """The options of `octavo calibrate-cnn`. The command does what `octavo calibrate --pipeline cnn` does."""

    pipeline: str | None = "cnn"
    capture: Path = argument(metavar="MODEL")
    images: Path | None = option("Calibrate with the pictures in this directory.", metavar="DIR")
    input_shape: str | None = option(
        "Calibrate without pictures, with generated inputs of this shape.", metavar="1,3,224,224"
    )
    samples: int | None = option(
        "Use only N of the pictures, spaced evenly among them.", type=click.IntRange(1), metavar="N"
    )
    activations: str | None = option(
        "One input range for each layer, or for each token at run time.", type=click.Choice(["static", "dynamic"])
    )
    formats: str = option(
        f"Formats to write: {', '.join(CLASSIFIER_FORMATS)}; separate several with commas.",
        "--format",
        default="ascend",
        metavar="NAMES",
    )
    dtype: str | None = option(
        "Dtype in which the quantized model will run  [default: float32]", type=click.Choice(DTYPES)
    )


def settings_of(options: CalibrateOptions, family: "Family", samples: int | None = None) -> "Settings":
    """Returns the settings of a calibration: those of the recipe --accuracy, changed by the other options. The layers
    that stay float by default are those of `family`. `samples` is the number of calls to replay; None: all that there
    are.

    Raises UsageError for options that contradict each other, and if a format of --format cannot hold layers of the
    scheme that --element and --activations stand for, or with inputs rotated as --rotation says.
    """
    from octavo.calibrate.formats import format_named
    from octavo.calibrate.formats.export import (
        check_rotation,
        check_scheme,
        folding,
        instead_of,
        mixable,
        multiplying,
        weight_scales_for,
    )
    from octavo.calibrate.settings import Settings

    _refuse_contradictions(options)
    defaults, recipe, formats = _default_floats(options, family), _recipe(options), formats_of(options)
    settings = Settings(
        element=options.element, clamping=any(format_named(name).clamping for name in formats),
        sigma=options.sigma, symmetric=options.symmetric, groups=family.groups, fold=folding(formats),
        keep_float=options.keep_float, defaults=defaults, more_float=family.more_float, rotation=options.rotation,
        quantize=options.quantize_too if defaults is None else (), attention=options.attention, samples=samples,
        explain=options.explain, budget=options.budget, release=True, name="--keep-float", **recipe,
    )  # fmt: skip
    check_scheme(formats, settings.element, settings.activations)
    check_rotation(formats, settings.rotation, settings.scheme)
    settings = replace(
        settings, weight_scales=weight_scales_for(formats, settings.scheme, options.weight_scales),
        multipliers=multiplying(formats, settings.scheme), mixable=mixable(formats),
        instead=instead_of(formats, settings.element, settings.activations),
    )  # fmt: skip
    if options.observer is not None and not settings.input_type.ranged:
        fact = f"has no effect, because {settings.activations} activations have no range that is chosen before a run"
        raise UsageError(f"--observer {options.observer} {fact}. Remove --observer, or add --activations static.")
    return settings


def _default_floats(options: CalibrateOptions, family: "Family") -> "Mapping[str, str] | None":
    """Returns a dict from pattern to reason for the layers that stay float by default in a pipeline of `family`,
    without the patterns of --quantize. Returns None if the family has no such patterns, so that a rule for all models
    decides. Raises UsageError for a pattern of --quantize that is not among the family's."""
    defaults = family.keep_float
    if not options.quantize_too or defaults is None:
        return defaults
    unknown = [pattern for pattern in options.quantize_too if pattern not in defaults]
    if unknown:
        fact = f"'{unknown[0]}' names no layers that stay float by default"
        raise UsageError(f"--quantize: {fact}. Choose one of {', '.join(defaults)}.")
    return {pattern: why for pattern, why in defaults.items() if pattern not in options.quantize_too}


def _recipe(options: CalibrateOptions) -> "dict[str, Any]":
    """Returns the fields of `Settings` that the recipe --accuracy sets, changed by the options that the user gave."""
    from octavo.calibrate.settings import RECIPES

    changes = {
        "observer": options.observer, "activations": "float" if options.weight_only else options.activations,
        "smoothing": options.smoothing, "weights": options.weights or None, "bias_correction": options.bias_correction,
    }  # fmt: skip
    recipe = RECIPES[options.accuracy] | {name: value for name, value in changes.items() if value is not None}
    if "static" not in NAMES[options.element]:
        recipe.setdefault("activations", next(iter(NAMES[options.element])))
    return recipe


def settings_for(options: CalibrateOptions, settings: "Settings", model: "nn.Module") -> "Settings":
    """Returns `settings` with what the formats of --format need for the denoiser `model`. Layers that a format cannot
    hold stay float too. If weights have one scale as a whole, the groups of layers are added that a format's software
    joins, because their weights share a scale. Raises UsageError if a format cannot hold the denoiser,
    or cannot ask for its attention to be quantized as --attention says."""
    from octavo.calibrate.formats.attention import check_attention
    from octavo.calibrate.formats.export import check_model, joined, kept_float
    from octavo.calibrate.part import planned

    formats = formats_of(options)
    check_model(formats, model, options.dtype)
    check_attention(formats, settings.attention, model)
    only_float = partial(kept_float, formats, scheme=settings.scheme)
    settings = settings.keeping(only_float(model, planned(model, settings).quantized))
    settings = replace(settings, only_float=only_float)
    if settings.weight_scales != "tensor":
        return settings
    return replace(settings, joined=joined(formats, model, planned(model, settings).quantized))


def _refuse_contradictions(options: CalibrateOptions) -> None:
    rounding = {
        f"--activations {options.activations}": options.activations, f"--observer {options.observer}": options.observer,
        "--symmetric": options.symmetric, "--smoothing": options.smoothing,
        f"--rotation {options.rotation}": options.rotation != "off",
    }  # fmt: skip
    input_options = [words for words, value in rounding.items() if value]
    if options.weight_only and input_options:
        fact = f"--weight-only leaves inputs float, so {input_options[0]} has no effect"
        raise UsageError(f"{fact}. Remove {input_options[0]} or --weight-only.")
    if options.symmetric and options.element != "int8":
        fact = f"--symmetric has no effect, because {options.element} has no zero point"
        raise UsageError(f"{fact}. Remove --symmetric.")
    if options.sigma != OBSERVED_SIGMA and options.observer != "sigma":
        remedy = "Add --observer sigma, or remove --sigma"
        raise UsageError(f"--sigma {options.sigma:g} only works with --observer sigma. {remedy}.")
    if both := sorted(set(options.keep_float) & set(options.quantize_too)):
        raise UsageError(f"--quantize {both[0]}: --keep-float has the same pattern. Remove one of the two options.")


def formats_of(options: CalibrateOptions) -> tuple[str, ...]:
    """Returns the names in --format: the formats to write. Raises UsageError for an unknown format, and for a format
    whose libraries are not installed."""
    from octavo.calibrate.formats.export import check_formats

    names = tuple(name.strip() for name in options.formats.split(","))
    check_formats(names)
    return names
