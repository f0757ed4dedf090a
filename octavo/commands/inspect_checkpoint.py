"""Shows a checkpoint: its layers, schemes and sizes, and line by line who can load it."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.inspect import DEFAULT, check, sound, views
from octavo.calibrate.formats.manifest import NOT_VERIFIABLE, Manifest, Verified, verify
from octavo.calibrate.report_file import read_report
from octavo.capture.errors import OctavoError

from ..terminal import Terminal, size


def inspect_checkpoint(path: Path, terminal: Terminal) -> bool:
    """Prints what is at `path` and returns whether it is sound: what is there for a consumer, that can load.

    Raises FileError for a file that differs from the manifest.
    """
    try:
        files, there, report = verified(path, terminal), views(path), read_report(path)
    except OctavoError:
        terminal.event("checkpoint", path=str(path), sound=False)
        raise
    verdicts = check(path)
    all_well, layers = sound(verdicts, set(there)), {}
    event: dict[str, Any] = {"path": str(path), "views": sorted(there), "verdicts": [v._asdict() for v in verdicts]}
    event |= {"verified": bool(files.manifests), "extra": list(files.extra)}
    try:
        for view, place in (there or {DEFAULT: path}).items():
            layers[view] = _show(view, place, terminal)
    except OctavoError:
        terminal.event("checkpoint", sound=False, layers=layers, **event)
        raise
    terminal.say(f"  files     {said_of(files.manifests)}")
    if report:
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


def verified(directory: Path, terminal: Terminal) -> Verified:
    """Compares the files in a directory with their manifests, and warns of files that no manifest lists. Raises
    FileError for a file that differs."""
    files = verify(directory)
    for name in files.extra:
        terminal.warn(f"{directory / name}: not in the manifest of its directory.")
    return files


def said_of(manifests: Collection[Manifest]) -> str:
    """A line on what was verified by these manifests."""
    if not manifests:
        return NOT_VERIFIABLE
    count = sum(len(each.files) for each in manifests)
    return f"{count} as octavo {', '.join(sorted({each.version for each in manifests}))} wrote them (SHA-256)"


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
