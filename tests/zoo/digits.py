"""The bundled ResNet on digits: its pictures, and the quality of its integers on held-out pictures."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.replay.sqnr import Power
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import Settings
from octavo.pipelines.classifier import classifier_directory, load_classifier
from octavo.pipelines.digits.data import Part, digits
from octavo.pipelines.digits.train import inputs_of


class Quality(NamedTuple):
    """Quality of a quantized classifier: its accuracy, the share of answers that agree with the float model, and the
    SQNR of the logits in dB."""

    accuracy: float
    agreement: float
    sqnr: float


def quality(exact: Tensor, outputs: Tensor, labels: Tensor) -> Quality:
    """Compares logits (n, classes) with the logits of the float model, `exact`, and with the labels."""
    power = Power()
    power.add(exact, outputs)
    answers = outputs.argmax(1)
    right, same = (answers == labels).float().mean(), (answers == exact.argmax(1)).float().mean()
    return Quality(float(right), float(same), power.sqnr or float("inf"))


class Digits(NamedTuple):
    """The bundled model, its calibration pictures, and the held-out pictures with their labels and float logits."""

    model: nn.Module
    training: Tensor
    held_out: Tensor
    labels: Tensor
    exact: Tensor


def bundled() -> Digits:
    """Loads the bundled model and its pictures, and computes the float logits."""
    model, preprocessing = load_classifier(classifier_directory("digits"))
    parts: tuple[Part, Part] = digits()
    training, held_out = (inputs_of(part, preprocessing) for part in parts)
    with torch.no_grad():
        exact = model(held_out).logits
    return Digits(model.requires_grad_(False), training, held_out, torch.from_numpy(parts[1].labels), exact)


def measured(data: Digits, calls: list[Sample], settings: Settings) -> Quality:
    """Calibrates on these calls and measures the quality of the result."""
    result, model = calibrate_folded(data.model, lambda: calls, settings)
    with torch.no_grad(), quantized(model, result.layers):
        return quality(data.exact, model(data.held_out).logits, data.labels)
