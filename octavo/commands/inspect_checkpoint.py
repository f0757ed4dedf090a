"""Shows a checkpoint: its layers, schemes and sizes, and line by line who can load it."""

import re
from pathlib import Path
from typing import Any

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.inspect import DEFAULT, check, sound, views
from octavo.capture.errors import OctavoError
from octavo.capture.sealed import json_object, read_bytes

from ..terminal import Terminal, size


def inspect_checkpoint(path: Path, terminal: Terminal) -> bool:
    """Prints what is at `path` and returns whether it is sound: what is there for a consumer, that can load."""
    there, verdicts = views(path), check(path)
    all_well, layers = sound(verdicts, set(there)), {}
    event: dict[str, Any] = {"path": str(path), "views": sorted(there), "verdicts": [v._asdict() for v in verdicts]}
    try:
        for view, place in (there or {DEFAULT: path}).items():
            layers[view] = _show(view, place, terminal)
    except OctavoError:
        terminal.event("checkpoint", sound=False, layers=layers, **event)
        raise
    if (path / "report.json").exists():
        report = json_object(read_bytes(path / "report.json"), path / "report.json")
        totals = report["totals"]
        before, after = size(totals["bytes_before"]), size(totals["bytes_after"])
        terminal.say(
            f"  layers    {totals['quantized']} quantized, {totals['kept_float']} float; {before} became {after}"
        )
        if report.get("model"):
            terminal.say(f"  made of   {report.get('component')} of {report['model']}")
    for verdict in verdicts:
        terminal.say(f"  {'yes' if verdict.ok else 'no ':<4}{verdict.consumer:<10} {verdict.subject}: {verdict.fact}")
    terminal.event("checkpoint", sound=all_well, layers=layers, **event)
    return all_well


def quantized_parts(pipeline: Path) -> list[Path]:
    """The components of a pipeline's directory that diffusers loads as quantized models."""
    folders = [place for place in sorted(pipeline.iterdir()) if place.is_dir()]
    return [place for place in folders if any(format_named(name).read is None for name in views(place))]


def _show(name: str, place: Path, terminal: Terminal) -> dict[str, int]:
    """A few lines on one format; returns how many layers of each scheme there are."""
    record = format_named(name)
    assert record.describe is not None
    described = record.describe(place)
    stored = size(sum(file.stat().st_size for file in place.iterdir() if re.fullmatch(record.files, file.name)))
    terminal.say(f"{place}: {described.title}, {stored}")
    for subject, fact in described.lines:
        terminal.say(f"  {subject:<9} {fact}")
    return described.schemes
