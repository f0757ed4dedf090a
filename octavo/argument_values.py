"""Reads the VALUE of --arg NAME=VALUE: JSON, a picture, the tensors in a file, or a text.

For a NAME such as image, mask_image or control_video, a text is the path of a picture. For a NAME such as prompt_embeds
or latents, a text is the path of a file of tensors. For any other NAME the ending decides: a text without quotes is a
path if it ends like the name of a picture or of a file of tensors; every other text stays a text.
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
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # also +1, 1_000 and .5, not in JSON
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def parse_argument(text: str) -> tuple[str, Any]:
    """Returns the name and the value in `text`, which has the form NAME=VALUE. The value is a JSON value, a text, a
    picture, a tensor, or the list of a video's frames. For a JSON list of paths it is a list of pictures or tensors.

    Raises UsageError for a text of another form, for a VALUE that looks like JSON but is not valid, for the path of a
    file that does not exist, and for a URL instead of a path; FileError for a file that cannot be read.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(
            f"--arg: '{text}' is not of the form NAME=VALUE. Write the name of an argument, = and its value."
        )
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        _refuse_misspelt(name, value)
        return name, _read_text(name, value, quoted=False)
    return name, _read(name, parsed)


def _refuse_misspelt(name: str, value: str) -> None:
    """Raises UsageError if `value`, given to the argument `name`, is not JSON but was probably meant as JSON, such as
    `True`, `+1` or `[1, 2` (without the closing bracket). Without this check the value would reach the pipeline as a
    text."""
    word = value.strip()
    if word in ("True", "False", "None"):
        word_in_json = "null" if word == "None" else word.lower()
        raise UsageError(f"--arg {name}: {word} would be read as a text. Write {word_in_json}.")
    if word[:1] in tuple('[{"') or _NUMBER.fullmatch(word):
        raise UsageError(
            f"--arg {name}: {word[:60]} is not valid JSON. Correct it, or quote it as a text: {name}='\"…\"'."
        )


def _read(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_read(name, item) for item in value]
    return _read_text(name, value, quoted=True) if isinstance(value, str) else value


def _read_text(name: str, text: str, quoted: bool) -> Any:
    """Returns the picture or tensor in the file whose path is `text`. Returns `text` itself if neither the argument's
    `name` nor the ending of `text` says that it is a path. `quoted` says whether the user wrote `text` in quotes; then
    only `name` counts."""
    path = Path(text).expanduser()
    ending = path.suffix.lower()
    tensors = bool(_TENSORS.search(name)) or (not quoted and ending in _FILES)
    pictures = not tensors and (bool(_PICTURES.search(name)) or (not quoted and ending in suffixes()))
    if not (tensors or pictures):
        return text
    try:
        if _URL.match(text):
            raise UsageError(f"{text} is a URL, and Octavo downloads nothing. Give the path of a file.")
        return _read_tensor(path, name) if tensors else _read_picture(path, name)
    except OctavoError as error:
        raise type(error)(f"--arg {name}: {error}") from error


def _read_picture(path: Path, name: str) -> Any:
    """Opens the picture at `path`: the first one, if the file holds several. If the argument's `name` ends in
    `video`, returns all frames in the file instead."""
    if name.endswith("video"):
        return open_frames(path)
    picture = open_picture(path)
    if (frames := count_frames(path)) > 1:
        log.warning("--arg %s: %s holds %d pictures. Only the first one is used.", name, path, frames)
    return picture


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    """Reads the tensor called `name` from the file at `path`, or the only tensor of the file, whatever its name. Raises
    UsageError if there is no file, or if its ending is not .safetensors, .npy, .pt, .pth or .bin; FileError if the file
    is damaged, or if it holds several tensors and none is called `name`."""
    if not path.exists():
        raise UsageError(f"{path}: no such file. Correct the path of the tensors.")
    if path.suffix.lower() not in _FILES or not path.is_file():
        raise UsageError(f"{path}: not a file of tensors. Give one that ends in .safetensors, .pt or .npy.")
    tensors = _read_tensors(path)
    chosen = tensors[name] if name in tensors else next(iter(tensors.values())) if len(tensors) == 1 else None
    if chosen is None:
        names = ", ".join(list(tensors)[:8]) or "none"
        raise FileError(f"{path}: has no tensor {name} (its tensors: {names}). Save the tensor under the name {name}.")
    return chosen.contiguous()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, as a dict from name to tensor. A file may hold a single tensor without a name; its
    name is then ""."""
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if path.suffix.lower() == ".npy":
            import numpy as np

            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
    except (SafetensorError, OSError, ValueError, EOFError, TypeError) as error:
        raise FileError(f"{path}: truncated or damaged ({first_sentence(error)[:200]}). Save it again.") from error
    content = safe_torch_load(path)
    named = content if isinstance(content, dict) else {"": content}
    return {str(key): value for key, value in named.items() if isinstance(value, torch.Tensor)}
