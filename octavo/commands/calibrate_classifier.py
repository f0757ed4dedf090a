"""`octavo calibrate-cnn`: calibrates an image classifier with pictures or without data."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from octavo.calibrate.calibration import calibrate_folded, planned
from octavo.calibrate.formats.target import check_target, least_size
from octavo.calibrate.preparation.synthetic_inputs import made_up, warnings_of
from octavo.calibrate.replay.calls import spread
from octavo.calibrate.replay.user_data import Sample
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import UsageError
from octavo.capture.ranks import Ranks
from octavo.capture.space import check_space
from octavo.pipelines import GENERIC
from octavo.pipelines.classifier import Classifier, classifier_directory, load_classifier
from octavo.pipelines.images import batches, image_files

from ..terminal import Terminal
from ..words import CLASSIFIER_FORMATS
from .calibrate_options import NOT_FOR_CLASSIFIERS, CalibrateOptions, formats_of, settings_of
from .calibrate_output import show, write

_ACCEPTED = ("pipeline", "max_shard_size")  # --pipeline cnn takes these of NOT_FOR_CLASSIFIERS; the size has no effect
_BATCH = 16  # pictures in a batch, at most
_BATCHES = (
    8  # batches of the pictures, at least, where there are so many: the calls that are judged are spread over them
)


def run_classifier(options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> None:
    """Runs the command. Whatever can be refused is refused before the model is loaded."""
    began = time.monotonic()
    if ranks.world > 1:
        raise UsageError("An image classifier is calibrated by one process. Start only one.")
    _check(options)
    check_target(options.out, overwrite=options.overwrite)
    settings = settings_of(options, GENERIC)
    files = [] if options.images is None else _chosen(image_files(Path(options.images)), options.samples)
    shape = None if options.input_shape is None else shape_of(options.input_shape)
    device, dtype = resolve_device(options.device), DTYPES[options.dtype or "float32"]
    classifier = load_classifier(classifier_directory(str(options.capture)), dtype)
    classifier.model.to(device).requires_grad_(False)
    plan = planned(classifier.model, settings)
    check_space(options.out, least_size(classifier.model, plan.quantized, len(formats_of(options))))
    calls: Callable[[], Iterator[Sample]]
    warnings: list[str] = []
    if shape is None:
        batch = min(_BATCH, max(1, len(files) // _BATCHES))
        count = -(-len(files) // (batch if classifier.preprocessing.fixed else 1))
        calls = _calls(files, classifier, batch, dtype)
    else:
        inputs = made_up(classifier.model, shape, progress=terminal.progress)
        count, calls, warnings = len(inputs), lambda: iter(inputs), warnings_of(classifier.model)
    settings = replace(settings, samples=count)
    result, model = calibrate_folded(
        classifier.model, calls, settings, progress=terminal.progress, changing=True, graphs=True, warnings=warnings
    )
    write(result, model, options)
    show(result, options, terminal, time.monotonic() - began)


def _check(options: CalibrateOptions) -> None:
    defaults = {field.name: field.default for field in fields(options)}
    for name in NOT_FOR_CLASSIFIERS:
        if name not in _ACCEPTED and getattr(options, name) != defaults[name]:
            word = "quantize" if name == "quantize_too" else name.replace("_", "-")
            raise UsageError(f"--{word} does not work with --pipeline cnn. Leave it out.")
    if others := [name for name in formats_of(options) if name not in CLASSIFIER_FORMATS]:
        raise UsageError(f"--format {others[0]} only works with denoisers. Choose of {', '.join(CLASSIFIER_FORMATS)}.")
    if options.activations == "timestep":
        raise UsageError("--activations timestep: an image classifier has no noise levels. Choose another.")
    if (options.images is None) == (options.input_shape is None):
        count = "neither" if options.images is None else "both"
        raise UsageError(f"An image classifier needs --images or --input-shape, and got {count}. Give one.")
    if options.samples is not None and options.images is None:
        raise UsageError("--samples only works with --images. Leave it out.")


def shape_of(text: str) -> list[int]:
    """The sizes in "1,3,224,224". Raises UsageError for anything but four numbers above 0."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape: '{text}' is not batch,channels,height,width. Give 1,3,224,224 or so.")
    return [int(part) for part in parts]


def _chosen(files: list[Path], samples: int | None) -> list[Path]:
    """`samples` of the pictures, spread evenly over them, or all of them."""
    return files if samples is None else [files[index] for index in spread(len(files), min(samples, len(files)))]


def _calls(files: list[Path], classifier: Classifier, batch: int, dtype: torch.dtype) -> Callable[[], Iterator[Sample]]:
    def calls() -> Iterator[Sample]:
        return (Sample((x.to(dtype),), {}) for x in batches(files, classifier.preprocessing, batch))

    return calls
