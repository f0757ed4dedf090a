"""Finds the formats in a checkpoint, and checks line by line who can load it, and why not."""

from pathlib import Path

from . import TABLE, format_named
from .record import Format
from .verdict import Verdict

DEFAULT = "ascend"  # the format that a directory without any known files is checked as


def shown_formats() -> list[Format]:
    """The formats that are looked for in a checkpoint."""
    return [each for name in TABLE if (each := format_named(name)).shown]


def views(directory: Path) -> dict[str, Path]:
    """The formats in a checkpoint and the path of each: the directory itself, or a folder named after the format."""
    places = {each.name: each.find(directory) for each in shown_formats()}
    return {name: place for name, place in places.items() if place is not None}


def quantized_parts(pipeline: Path) -> list[Path]:
    """The components of a pipeline's directory that diffusers loads as quantized models."""
    folders = [place for place in sorted(pipeline.iterdir()) if place.is_dir()]
    return [place for place in folders if any(format_named(name).read is None for name in views(place))]


def check(directory: Path | str) -> list[Verdict]:
    """The verdicts on a checkpoint, format by format; a file that cannot be read gives a verdict, not an error."""
    directory = Path(directory)
    there = views(directory)
    verdicts = [
        verdict
        for name, place in (there or {DEFAULT: directory}).items()
        for verdict in format_named(name).check(place)
    ]
    return verdicts + [
        Verdict(each.consumer, "files", False, f"none for it. Calibrate with --format {each.name}")
        for each in shown_formats()
        if each.name not in there and there
    ]


def sound(verdicts: list[Verdict], names: set[str]) -> bool:
    """Whether every verdict that the consumers of the formats `names` need is positive; without names, of DEFAULT."""
    needed = [format_named(name) for name in names or {DEFAULT}]
    consumers = {"octavo", *(each.consumer for each in needed)}
    optional = {(each.consumer, subject) for each in needed for subject in each.optional}
    return all(v.ok for v in verdicts if v.consumer in consumers and (v.consumer, v.subject) not in optional)
