"""Shows a checkpoint: its layers, schemes and sizes, and line by line who can load it."""

import json
from collections import Counter
from pathlib import Path

from calibrate.export.check import check
from calibrate.load import Checkpoint
from capture.errors import CaptureError
from capture.sealed import read_bytes

from .terminal import Terminal, size


def inspect_checkpoint(path: Path, terminal: Terminal) -> bool:
    """Prints what is at `path` and returns whether it is sound: its own files whole, and MindIE-SD able to load it."""
    verdicts = check(path)
    try:
        checkpoint = Checkpoint(path)
    except CaptureError as error:
        terminal.event("checkpoint", path=str(path), sound=False, verdicts=[v._asdict() for v in verdicts])
        raise error
    schemes = Counter(word for key, word in checkpoint.description.items() if key.endswith(".weight"))
    stored = sum(file.stat().st_size for file in path.iterdir())
    terminal.say(f"{path}: an Ascend checkpoint, {checkpoint.scheme}, {size(stored)}")
    terminal.say("  weights   " + ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))
    if levels := checkpoint.levels:
        terminal.say(f"  steps     {len(levels)}, at noise levels {levels[0]:g} to {levels[-1]:g}")
    report = path / "report.json"
    if report.exists():
        totals = json.loads(read_bytes(report))["totals"]
        before, after = size(totals["bytes_before"]), size(totals["bytes_after"])
        terminal.say(
            f"  layers    {totals['quantized']} quantized, {totals['kept_float']} float; {before} became {after}"
        )
    for verdict in verdicts:
        terminal.say(f"  {'yes' if verdict.ok else 'no ':<4}{verdict.consumer:<10} {verdict.subject}: {verdict.fact}")
    needed = [
        v for v in verdicts if v.consumer == "octavo" or (v.consumer == "MindIE-SD" and v.subject != "in bfloat16")
    ]
    sound = all(v.ok for v in needed)
    terminal.event("checkpoint", path=str(path), sound=sound, verdicts=[v._asdict() for v in verdicts])
    return sound
