"""Checks the options of a command before the command imports torch, which takes seconds: paths that must exist, sizes,
and names of formats."""

from pathlib import Path
from typing import Any

from octavo.calibrate.byte_sizes import parse_size
from octavo.capture.errors import UsageError

from ..words import FORMATS, PROMPT_SETS

_BUNDLED = ("demo", "demo-int8", "digits")  # models that come with Octavo
# options and arguments that are paths: the kind of path, and what to do if it does not exist
_PATHS = {
    "model": ("model directory", "Give a diffusers directory, or demo"),
    "of": ("model directory", "Give the float pipeline with --model"),
    "checkpoints": ("directory", "Give a directory that octavo calibrate wrote"),
    "images": ("directory", "Give a directory of pictures"),
    "text_encoder": ("directory", "Give the folder of the text encoder"),
    "prompts": ("prompts file", f"Give a file or one of {', '.join(PROMPT_SETS)}"),
}


def need(path: str | Path, kind: str, remedy: str = "") -> None:
    """Raises UsageError if `path` does not exist. `kind` is what should be there, such as "directory", and `remedy` the
    advice to the user; both are for the message."""
    try:
        exists = Path(path).exists()
    except OSError:  # the name is too long, or permission is missing: the command itself reports that
        return
    if not exists:
        raise UsageError(f"{path}: no such {kind}. {remedy}".rstrip(". ") + ".")


def check(options: Any) -> None:
    """Raises UsageError for an option that must be the path of an existing file or directory, such as --text-encoder,
    if there is nothing at the path. `options` holds the options of a command."""
    for name, (kind, remedy) in _PATHS.items():
        value = getattr(options, name, None)
        for path in value if isinstance(value, tuple) else (value,):
            if path and str(path) not in (*_BUNDLED, *(PROMPT_SETS if name == "prompts" else ())):
                need(path, kind, remedy)


def check_calibration(options: Any) -> None:
    """Raises UsageError if the path in one of the `options` of a calibration does not exist, a format of --format is
    unknown, or --max-shard-size or --memory is not a size."""
    if options.pipeline is None:
        check(options)
        need(options.capture, "capture", "Make a capture with octavo capture")
    elif str(options.capture) not in _BUNDLED:
        need(options.capture, "model directory", "Give a transformers directory, or digits")
    if options.images is not None:
        need(options.images, *_PATHS["images"])
    for name in (name.strip() for name in options.formats.split(",")):
        if name not in FORMATS:
            raise UsageError(f"--format: there is no format '{name}'. Choose one of {', '.join(FORMATS)}.")
    parse_size(options.max_shard_size, "--max-shard-size")
    if options.memory is not None:
        parse_size(options.memory, "--memory")
