"""Shows a checkpoint: its layers, schemes and sizes, and line by line who can load it."""

from collections import Counter
from pathlib import Path
from typing import Any

from octavo.calibrate.formats.ascend.checkpoint import Checkpoint
from octavo.calibrate.formats.diffusers.directory import Model
from octavo.calibrate.formats.diffusers.structure import Structure
from octavo.calibrate.formats.inspect import Verdict, check, views
from octavo.calibrate.formats.verdict import OCTAVO, TORCHAO
from octavo.capture.errors import OctavoError
from octavo.capture.sealed import json_object, read_bytes

from ..terminal import Terminal, size

_NEEDED = {"ascend": ("octavo", "MindIE-SD"), "diffusers": ("octavo", OCTAVO), "torchao": ("octavo", TORCHAO)}


def inspect_checkpoint(path: Path, terminal: Terminal) -> bool:
    """Prints what is at `path` and returns whether it is sound: what is there for a consumer, that can load."""
    there, verdicts = views(path), check(path)
    sound, layers = _sound(verdicts, set(there)), {}
    event: dict[str, Any] = {"path": str(path), "views": sorted(there), "verdicts": [v._asdict() for v in verdicts]}
    try:
        for view, place in there.items() if there else {"ascend": path}.items():
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
    terminal.event("checkpoint", sound=sound, layers=layers, **event)
    return sound


def quantized_parts(pipeline: Path) -> list[Path]:
    """The components of a pipeline's directory that are checkpoints for diffusers."""
    return [place for place in sorted(pipeline.iterdir()) if place.is_dir() and set(views(place)) - {"ascend"}]


def _sound(verdicts: list[Verdict], there: set[str]) -> bool:
    """Whether all is well that those need for whom there are files. Nobody needs bfloat16."""
    needed = {consumer for view in there or {"ascend"} for consumer in _NEEDED[view]}
    return all(
        v.ok for v in verdicts if v.consumer in needed and (v.consumer, v.subject) != ("MindIE-SD", "in bfloat16")
    )


def _show(view: str, place: Path, terminal: Terminal) -> dict[str, int]:
    """A few lines on one format; how many layers of each scheme there are."""
    stored = size(sum(file.stat().st_size for file in place.iterdir() if _of(view, file.name)))
    if view == "ascend":
        checkpoint = Checkpoint(place)
        schemes = Counter(word for key, word in checkpoint.description.items() if key.endswith(".weight"))
        terminal.say(f"{place}: an Ascend checkpoint, {checkpoint.scheme}, {stored}")
        terminal.say("  weights   " + ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))
        if levels := checkpoint.levels:
            terminal.say(f"  steps     {len(levels)}, at noise levels {levels[0]:g} to {levels[-1]:g}")
        return dict(schemes)
    model = Model.open(place)
    if view == "torchao":
        schemes = Counter({"Int8Tensor": sum(key.endswith("._weight_qdata") for key in model.tensors)})
    else:
        schemes = Counter(kind.scheme for kind in Structure.read(model.quantization).kinds.values())
    kind = model.config.get("_class_name")
    terminal.say(f"{place}: a {kind} for diffusers {'with torchao' if view == 'torchao' else 'with octavo'}, {stored}")
    terminal.say("  layers    " + ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))
    return dict(schemes)


def _of(view: str, name: str) -> bool:
    """Whether a file is of that format."""
    return name.startswith("quant_model_" if view == "ascend" else ("config.json", "diffusion_pytorch_model"))
