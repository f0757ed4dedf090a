"""Shows and checks, for `octavo inspect`, a single safetensors file that any program may have written."""

import os
from pathlib import Path

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.inspect import sound
from octavo.calibrate.formats.manifest import manifests_of, verify
from octavo.capture.errors import OctavoError

from ..terminal import Terminal, size
from .inspect_checkpoint import verified_text

FORMAT = "comfy"  # the format of single files


def inspect_file(path: Path, terminal: Terminal) -> bool:
    """Prints the contents of the safetensors file at `path`. Returns whether the file is sound: ComfyUI loads all its
    int8 layers, with valid scales, and ignores neither a tensor nor a quantization setting that the file holds.

    Raises FileError for a file that is damaged or differs from the manifest beside it.
    """
    place, record = Path(os.path.realpath(path)), format_named(FORMAT)
    assert record.describe is not None
    try:
        verify(place.parent, {place.name})
        manifests = manifests_of(place.parent, place.name)
        description = record.describe(place)
    except OctavoError:
        terminal.event("checkpoint", path=str(path), sound=False)
        raise
    verdicts = record.check(place)
    terminal.say(f"{path}: {description.title}, {size(place.stat().st_size)}")
    for subject, fact in description.lines:
        terminal.say(f"  {subject:<9} {fact}")
    terminal.say(f"  files     {verified_text(manifests)}")
    for verdict in verdicts:
        terminal.say(f"  {'yes' if verdict.ok else 'no ':<4}{verdict.consumer:<10} {verdict.subject}: {verdict.fact}")
    is_sound = sound(verdicts, {FORMAT})
    terminal.event(
        "checkpoint", path=str(path), sound=is_sound, layers={FORMAT: description.schemes},
        verdicts=[verdict._asdict() for verdict in verdicts], verified=bool(manifests),
    )  # fmt: skip
    return is_sound
