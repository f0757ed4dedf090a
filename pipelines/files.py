"""Finds a model directory and reads its files, which may be links, as in the cache of a hub."""

from pathlib import Path
from typing import Any

from octavo.capture.errors import FileError
from octavo.capture.sealed import json_object

_AGAIN = "Download it again."
DEMO = Path(__file__).parent / "demo" / "model"
DEMO_INT8 = Path(__file__).parent / "demo" / "int8"


def model_directory(model: str) -> Path:
    """The directory that a MODEL argument means: `demo` is the bundled pipeline, `demo-int8` its quantized denoiser."""
    bundled = {"demo": DEMO, "demo-int8": DEMO_INT8}
    return bundled[model] if model in bundled and not Path(model).exists() else Path(model)


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises FileError when there is none."""
    try:
        return json_object(file.read_bytes(), file, _AGAIN)
    except OSError as error:
        raise FileError(f"{file}: {(error.strerror or str(error)).lower()}. {_AGAIN}") from None
