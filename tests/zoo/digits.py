"""The bundled ResNet on digits: its calls, and what its integers make of pictures held out."""

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
    """Of a quantized classifier: shares of right answers and of those like the float model's, SQNR of logits in dB."""

    accuracy: float
    agreement: float
    sqnr: float


def quality(exact: Tensor, found: Tensor, labels: Tensor) -> Quality:
    """Of logits (n, classes), against the float ones."""
    power = Power()
    power.add(exact, found)
    answers = found.argmax(1)
    right, same = (answers == labels).float().mean(), (answers == exact.argmax(1)).float().mean()
    return Quality(float(right), float(same), power.sqnr or float("inf"))


class Digits(NamedTuple):
    """The bundled model, pictures to calibrate with, those held out, what they show, and the float logits."""

    model: nn.Module
    training: Tensor
    held: Tensor
    labels: Tensor
    exact: Tensor


def bundled() -> Digits:
    """All of it."""
    model, preprocessing = load_classifier(classifier_directory("digits"))
    parts: tuple[Part, Part] = digits()
    training, held = (inputs_of(part, preprocessing) for part in parts)
    with torch.no_grad():
        exact = model(held).logits
    return Digits(model.requires_grad_(False), training, held, torch.from_numpy(parts[1].labels), exact)


def measured(data: Digits, calls: list[Sample], settings: Settings) -> Quality:
    """What these calls lead to."""
    result, model = calibrate_folded(data.model, lambda: calls, settings)
    with torch.no_grad(), quantized(model, result.layers):
        return quality(data.exact, model(data.held).logits, data.labels)
