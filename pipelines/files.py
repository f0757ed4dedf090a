"""Reads files of a model directory, which may be links, as in the cache of a hub."""

from pathlib import Path
from typing import Any

from octavo.capture.errors import FileError
from octavo.capture.sealed import json_object

_AGAIN = "Download it again."


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises FileError when there is none."""
    try:
        return json_object(file.read_bytes(), file, _AGAIN)
    except OSError as error:
        raise FileError(f"{file}: {(error.strerror or str(error)).lower()}. {_AGAIN}") from None
