"""Runs `octavo calibrate-cnn`: calibrates an image classifier with pictures, or without data."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from octavo.calibrate.calibration import calibrate_folded, planned
from octavo.calibrate.formats.target import check_target, least_size
from octavo.calibrate.preparation.synthetic_inputs import synthetic_calls, warnings_of
from octavo.calibrate.replay.calls import evenly_spaced
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

# options in NOT_FOR_CLASSIFIERS that `octavo calibrate --pipeline cnn` accepts; --max-shard-size has no effect
_ACCEPTED = ("pipeline", "max_shard_size")
_BATCH = 16  # largest number of pictures in a batch
_BATCHES = 8  # smallest number of batches, if there are as many pictures: the measured calls are chosen among batches


def run_classifier(options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> None:
    """Runs `octavo calibrate-cnn` with `options`, which are checked before the model is loaded. Raises UsageError if a
    launcher started several processes."""
    began = time.monotonic()
    if ranks.world > 1:
        fact = f"{ranks.world} processes were started, and an image classifier is calibrated by one"
        raise UsageError(f"{fact}. Start octavo calibrate-cnn without a launcher.")
    _check(options)
    check_target(options.out, overwrite=options.overwrite)
    settings = settings_of(options, GENERIC)
    files = [] if options.images is None else _sampled(image_files(Path(options.images)), options.samples)
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
        inputs = synthetic_calls(classifier.model, shape, progress=terminal.progress)
        count, calls, warnings = len(inputs), lambda: iter(inputs), warnings_of(classifier.model)
    settings = replace(settings, samples=count)
    result, model = calibrate_folded(
        classifier.model, calls, settings, progress=terminal.progress, changing=True, graphs=True, warnings=warnings
    )
    write(result, model, options)
    show(result, options, terminal, time.monotonic() - began)
    terminal.next("inspect", options.out)


def _check(options: CalibrateOptions) -> None:
    defaults = {field.name: field.default for field in fields(options)}
    for name in NOT_FOR_CLASSIFIERS:
        if name not in _ACCEPTED and getattr(options, name) != defaults[name]:
            word = "quantize" if name == "quantize_too" else name.replace("_", "-")
            raise UsageError(f"--{word} does not work with --pipeline cnn. Remove it.")
    if others := [name for name in formats_of(options) if name not in CLASSIFIER_FORMATS]:
        choices = ", ".join(CLASSIFIER_FORMATS)
        raise UsageError(f"--format {others[0]} only works with denoisers. Choose one of {choices}.")
    if options.activations == "timestep":
        raise UsageError("--activations timestep: an image classifier has no noise levels. Use static or dynamic.")
    if (options.images is None) == (options.input_shape is None):
        count = "neither was given" if options.images is None else "both were given"
        raise UsageError(f"An image classifier needs --images or --input-shape, but {count}. Give one of them.")
    if options.samples is not None and options.images is None:
        raise UsageError("--samples only works with --images. Remove it.")


def shape_of(text: str) -> list[int]:
    """Returns the sizes (batch, channels, height, width) in a text such as "1,3,224,224". Raises UsageError for any
    other text, and if a size is 0."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape: '{text}' is not batch,channels,height,width. Give a shape like 1,3,224,224.")
    return [int(part) for part in parts]


def _sampled(files: list[Path], samples: int | None) -> list[Path]:
    return files if samples is None else [files[index] for index in evenly_spaced(len(files), min(samples, len(files)))]


def _calls(files: list[Path], classifier: Classifier, batch: int, dtype: torch.dtype) -> Callable[[], Iterator[Sample]]:
    """Returns a function that iterates over the calibration calls: batches of at most `batch` of the pictures in
    `files`, preprocessed for the classifier and cast to `dtype`."""

    def calls() -> Iterator[Sample]:
        return (Sample((x.to(dtype),), {}) for x in batches(files, classifier.preprocessing, batch))

    return calls
