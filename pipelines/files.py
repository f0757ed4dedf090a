"""Reads files of a model directory, which may be links, as in the cache of a hub."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from octavo.capture.errors import FileError
from octavo.capture.json_kinds import check_layers
from octavo.capture.sealed import json_object, read_bytes

_AGAIN = "Download it again."


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


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a model. Raises FileError where there is none, and for a config that claims more layers
    than the weight files beside it can hold."""
    config, weights = read_json(folder / "config.json"), list(folder.glob("*.safetensors"))
    if weights:
        check_layers(config, count_tensors(weights), folder / "config.json")
    return config
