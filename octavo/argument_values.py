"""Reads the values that --arg NAME=VALUE gives: JSON, pictures, tensors of a file, or a text.

The name tells what a text stands for. Arguments such as image, mask_image and control_video take pictures, arguments
such as prompt_embeds and latents take tensors; elsewhere the ending of the text tells, where no quotes are around it.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo.capture.errors import FileError, OctavoError, UsageError, first_sentence
from octavo.capture.pth.pth import safe_torch_load
from octavo.pipelines.pictures import count_frames, open_frames, open_picture, suffixes

log = logging.getLogger(__name__)

_TENSORS = re.compile(r"embed|latents|attention_mask|hidden_states|cu_seqlens|embeds_mask")
_PICTURES = re.compile(r"(^|_)(images?|mask|video|depth_map)$")
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".npy")
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # also those that JSON does not know
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def parsed(text: str) -> tuple[str, Any]:
    """The name and the value in NAME=VALUE; a list of paths is a list of pictures or tensors.

    Raises UsageError for anything else, for a file that is not there and for an address; FileError for a file that
    cannot be read.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--arg {text}: not NAME=VALUE. Give the name of an argument of the pipeline's call.")
    try:
        found = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        _refuse_misspelt(name, value)
        return name, _of_text(name, value, quoted=False)
    return name, _read(name, found)


def _refuse_misspelt(name: str, value: str) -> None:
    """Raises UsageError for what was meant as JSON, and would go to the pipeline as a text."""
    word = value.strip()
    if word in ("True", "False", "None"):
        raise UsageError(f"--arg {name}: {word} would be a text. Write {'null' if word == 'None' else word.lower()}.")
    if word[:1] in tuple('[{"') or _NUMBER.fullmatch(word):
        raise UsageError(
            f"--arg {name}: {word[:60]} is not JSON. Correct it, or put quotes around a text: {name}='\"…\"'."
        )


def _read(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_read(name, item) for item in value]
    return _of_text(name, value, quoted=True) if isinstance(value, str) else value


def _of_text(name: str, text: str, quoted: bool) -> Any:
    """The picture or tensor that a text names, or the text itself."""
    path = Path(text).expanduser()
    ending = path.suffix.lower()
    tensors = bool(_TENSORS.search(name)) or (not quoted and ending in _FILES)
    pictures = not tensors and (bool(_PICTURES.search(name)) or (not quoted and ending in suffixes()))
    if not (tensors or pictures):
        return text
    try:
        if _URL.match(text):
            raise UsageError(f"{text}: an address, and Octavo downloads nothing. Give a file.")
        return _tensor(path, name) if tensors else _picture(path, name)
    except OctavoError as error:
        raise type(error)(f"--arg {name}: {error}") from error


def _picture(path: Path, name: str) -> Any:
    """A picture; for an argument `video`, all frames of an animation."""
    if name.endswith("video"):
        return open_frames(path)
    picture = open_picture(path)
    if (frames := count_frames(path)) > 1:
        log.warning("--arg %s: %s holds %d pictures; the first one is taken.", name, path, frames)
    return picture


def _tensor(path: Path, name: str) -> torch.Tensor:
    """The only tensor in a file, or the one of this name."""
    if not path.exists():
        raise UsageError(f"{path}: no such file of tensors. Correct the path.")
    if path.suffix.lower() not in _FILES or not path.is_file():
        raise UsageError(f"{path}: not a file of tensors. Give one that ends in .safetensors, .pt or .npy.")
    found = _tensors(path)
    chosen = found[name] if name in found else next(iter(found.values())) if len(found) == 1 else None
    if chosen is None:
        held = ", ".join(list(found)[:8]) or "none"
        raise FileError(f"{path}: no tensor {name} among {held}. Save the tensor under this name.")
    return chosen.contiguous()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file by name; a file of one tensor without a name has it under ""."""
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if path.suffix.lower() == ".npy":
            import numpy as np

            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
    except (SafetensorError, OSError, ValueError, EOFError, TypeError) as error:
        raise FileError(f"{path}: truncated or damaged ({first_sentence(error)[:200]}). Save it again.") from error
    found = safe_torch_load(path)
    named = found if isinstance(found, dict) else {"": found}
    return {str(key): value for key, value in named.items() if isinstance(value, torch.Tensor)}
