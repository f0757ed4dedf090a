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
    """The directory that a MODEL argument means: `demo` is the bundled pipeline, `demo-int8` its quantized denoiser."""
    bundled = {"demo": DEMO, "demo-int8": DEMO_INT8}
    return bundled[model] if model in bundled and not Path(model).exists() else Path(model)


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises FileError when there is none.

    Numbers may be infinite, as they are in configs of schedulers.
    """
    return json_object(read_bytes(Path(os.path.realpath(file)), remedy=_AGAIN), file, _AGAIN, finite=False)


def count_tensors(weights: Iterable[Path]) -> int:
    """The number of tensors in safetensors files. Raises FileError for a file that is truncated or damaged."""
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
    """Reads the config.json of a model. Raises FileError where there is none, and for a config that claims more layers
    than its `weights` can hold: safetensors files, by default all beside it."""
    config = read_json(folder / "config.json")
    weights = list(folder.glob("*.safetensors")) if weights is None else weights
    if weights:
        check_layers(config, count_tensors(weights), folder / "config.json")
    return config
