"""Shows a checkpoint: its layers, schemes and sizes, and which libraries can load its files."""

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
    """Prints the contents of the checkpoint at `path`. Returns whether the checkpoint is sound: its numbers are valid,
    and the files of each format can be loaded by the library that the format is for.

    Raises FileError for a file that differs from the manifest.
    """
    try:
        files, places, report = verified(path, terminal), views(path), read_report(path)
    except OctavoError:
        terminal.event("checkpoint", path=str(path), sound=False)
        raise
    verdicts = check(path)
    is_sound, layers = sound(verdicts, set(places)), {}
    event: dict[str, Any] = {"path": str(path), "views": sorted(places), "verdicts": [v._asdict() for v in verdicts]}
    event |= {"verified": bool(files.manifests), "extra": list(files.extra)}
    try:
        for view, place in (places or {DEFAULT: path}).items():
            layers[view] = _show(view, place, terminal)
    except OctavoError:
        terminal.event("checkpoint", sound=False, layers=layers, **event)
        raise
    terminal.say(f"  files     {verified_text(files.manifests)}")
    if report:
        totals = report["totals"]
        before, after = size(totals["bytes_before"]), size(totals["bytes_after"])
        terminal.say(
            f"  layers    {totals['quantized']} quantized, {totals['kept_float']} float; {before} became {after}"
        )
        if report.get("model"):
            terminal.say(f"  made from {report.get('component')} of {report['model']}")
    for verdict in verdicts:
        terminal.say(f"  {'yes' if verdict.ok else 'no ':<4}{verdict.consumer:<10} {verdict.subject}: {verdict.fact}")
    terminal.event("checkpoint", sound=is_sound, layers=layers, **event)
    return is_sound


def verified(directory: Path, terminal: Terminal) -> Verified:
    """Compares the files in `directory` with the digests in its manifests. Returns the manifests and the files that no
    manifest lists, and prints a warning for each of these files.

    Raises FileError for a file that a manifest lists and that is missing or has another digest.
    """
    files = verify(directory)
    for name in files.extra:
        terminal.warn(f"{directory / name}: is not in the manifest of its directory, so it was not checked.")
    return files


def verified_text(manifests: Collection[Manifest]) -> str:
    if not manifests:
        return NOT_VERIFIABLE
    count = sum(len(manifest.files) for manifest in manifests)
    versions = ", ".join(sorted({manifest.version for manifest in manifests}))
    return f"{count} identical to what octavo {versions} wrote (SHA-256)"


def _show(name: str, place: Path, terminal: Terminal) -> dict[str, int]:
    """Prints what the files of the format `name` in the directory `place` contain. Returns a dict from scheme to the
    number of layers that have it."""
    record = format_named(name)
    assert record.describe is not None
    description = record.describe(place)
    stored = size(sum(file.stat().st_size for file in place.iterdir() if re.fullmatch(record.files, file.name)))
    terminal.say(f"{place}: {description.title}, {stored}")
    for subject, fact in description.lines:
        terminal.say(f"  {subject:<9} {fact}")
    return description.schemes
