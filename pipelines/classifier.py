"""Loads image classifiers of transformers, the models that `octavo calibrate-cnn` takes, from directories."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from octavo.capture.errors import FileError, UsageError

from .files import read_json
from .images import Preprocessing, preprocessing_of
from .load import check_finite, load_component, one_line, quiet
from .weights import check_weights

BUNDLED = {"digits": Path(__file__).parent / "digits" / "model"}


class Classifier(NamedTuple):
    """Holds a model in eval mode and the preprocessing of its pictures."""

    model: nn.Module
    preprocessing: Preprocessing


def classifier_directory(model: str) -> Path:
    """Returns the directory that the argument MODEL of calibrate-cnn names. `digits` is the bundled classifier, unless
    there is a directory of this name."""
    return BUNDLED.get(model, Path(model)) if not Path(model).exists() else Path(model)


def load_classifier(directory: Path, dtype: torch.dtype = torch.float32) -> Classifier:
    """Loads the model in a directory; downloads nothing, opens no pickle, runs no code of the directory.

    Raises UsageError if `directory` is not a directory, FileError for a directory without an image classifier or with a
    damaged file, MisfitError for weights that are missing or have the wrong shape, NumbersError for weights that are
    not finite.
    """
    if not directory.is_dir():
        names = ", ".join(BUNDLED)
        raise UsageError(f"{directory}: no such model directory. Give a transformers directory, or {names}.")
    if not (directory / "config.json").is_file():
        raise FileError(f"{directory}: no config.json. Give the directory of an image classifier.")
    words = read_json(directory / "config.json")
    if "pretrained_cfg" in words or words.get("model_type") == "timm_wrapper":
        fact = "is a model of timm, whose preprocessing is not read"
        raise FileError(f"{directory}: {fact}. Give octavo.Calibrator the model and its inputs in Python.")
    check_weights(directory)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            kind = AutoModelForImageClassification._model_mapping[type(config)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = words.get("model_type") or one_line(error)
            raise FileError(
                f"{directory}: not an image classifier that transformers knows ({reason}). Give the directory of one."
            ) from error
        options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True, "config": config}
        model = load_component(directory, kind[0] if isinstance(kind, tuple) else kind, options, strict=False)
    check_finite(model, directory.name)
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    return Classifier(model, preprocessing_of(directory, channels, size if isinstance(size, int) else 224))
