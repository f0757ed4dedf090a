"""Checks options before a command imports what it runs with, which takes seconds: paths that have to be there, sizes
and names of formats."""

from pathlib import Path
from typing import Any

from octavo.calibrate.byte_sizes import parse_size
from octavo.capture.errors import UsageError

from ..words import FORMATS, PROMPT_SETS

_BUNDLED = ("demo", "demo-int8", "digits")  # models that come with Octavo
# options and arguments that are paths: what they are of, and what to give
_PATHS = {
    "model": ("model directory", "Give a diffusers directory, or demo"),
    "of": ("model directory", "Give the float pipeline with --model"),
    "checkpoint": ("directory", "Give what octavo calibrate wrote"),
    "images": ("directory", "Give one with pictures"),
    "text_encoder": ("directory", "Give the folder of the text encoder"),
    "prompts": ("prompts file", f"Give a file or one of {', '.join(PROMPT_SETS)}"),
}


def need(path: str | Path, what: str, remedy: str = "") -> None:
    """Raises UsageError where nothing is at `path`: every command tells so of a missing file or directory."""
    try:
        there = Path(path).exists()
    except OSError:  # a name too long, or no permission: the command itself says so
        return
    if not there:
        raise UsageError(f"{path}: no such {what}. {remedy}".rstrip(". ") + ".")


def check(options: Any) -> None:
    """Raises UsageError for options of a command that cannot be right."""
    for name, (what, remedy) in _PATHS.items():
        value = getattr(options, name, None)
        if value and str(value) not in (*_BUNDLED, *(PROMPT_SETS if name == "prompts" else ())):
            need(value, what, remedy)


def check_calibration(options: Any) -> None:
    """Raises UsageError for options of a calibration that cannot be right."""
    if options.pipeline is None:
        check(options)
        need(options.capture, "capture", "Make one with octavo capture")
    elif str(options.capture) not in _BUNDLED:
        need(options.capture, "model directory", "Give a transformers directory, or digits")
    if options.images is not None:
        need(options.images, *_PATHS["images"])
    for name in (name.strip() for name in options.formats.split(",")):
        if name not in FORMATS:
            raise UsageError(f"format: no '{name}'. Choose one of {', '.join(FORMATS)}.")
    parse_size(options.max_shard_size, "--max-shard-size")
    if options.memory is not None:
        parse_size(options.memory, "--memory")
