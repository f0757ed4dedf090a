"""Finds a model directory and reads its files, which may be links, as in the cache of a hub."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from octavo.capture.errors import FileError
from octavo.capture.json_kinds import check_layers
from octavo.capture.sealed import json_object, read_bytes

_AGAIN = "Download it again."
DEMO = Path(__file__).parent / "demo" / "model"
DEMO_INT8 = Path(__file__).parent / "demo" / "int8"


def model_directory(model: str) -> Path:
    """Returns the directory that the argument `model` of a command names.

    `demo` is the bundled pipeline, `demo-int8` a checkpoint of its quantized denoiser, unless there is a directory of
    this name.
    """
    bundled = {"demo": DEMO, "demo-int8": DEMO_INT8}
    return bundled[model] if model in bundled and not Path(model).exists() else Path(model)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises FileError for a missing file and for any other content.

    Numbers may be infinite, as in the configs of schedulers.
    """
    return json_object(read_bytes(Path(os.path.realpath(file)), remedy=_AGAIN), file, _AGAIN, finite=False)


def count_tensors(weights: Iterable[Path]) -> int:
    """Returns the number of tensors in the safetensors files `weights`. Raises FileError for a truncated or damaged
    file."""
    count = 0
    for file in weights:
        try:
            with safe_open(file, "pt", backend="pread") as opened:
                count += len(opened.keys())
        except (SafetensorError, OSError) as error:
            fact = str(error).removeprefix("Error while deserializing header: ")
            raise FileError(f"{file}: truncated or damaged ({fact}). Download the file again.") from None
    return count


def read_config(folder: Path, weights: Sequence[Path] | None = None) -> dict[str, Any]:
    """Reads the config.json of a model in `folder`.

    Raises FileError without a config.json, and for one that claims more layers than the safetensors files `weights` can
    hold (default: all in the folder).
    """
    config = read_json(folder / "config.json")
    weights = list(folder.glob("*.safetensors")) if weights is None else weights
    if weights:
        check_layers(config, count_tensors(weights), folder / "config.json")
    return config
