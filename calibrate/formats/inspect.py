"""Who can load a checkpoint, line by line, and why not. What MindIE-SD demands is in `ascend.check`."""

from collections.abc import Iterator
from pathlib import Path

from octavo.capture.errors import OctavoError

from .arithmetic import correction_share, shares
from .ascend.check import mindie, modes
from .ascend.checkpoint import Checkpoint
from .ascend.read import read_layer
from .diffusers.check import check_model
from .diffusers.directory import method_at
from .diffusers.structure import QUANT_METHOD
from .verdict import OCTAVO, TORCHAO, Verdict

__all__ = ["Verdict", "check", "views"]


def check(directory: Path | str) -> list[Verdict]:
    """The verdicts on a checkpoint, view by view. A file that cannot be read is one too; nothing is raised for it."""
    directory = Path(directory)
    there = views(directory)
    verdicts = _ascend(directory) if "ascend" in there or not there else []
    for view, place in there.items():
        if view != "ascend":
            verdicts += check_model(place)
    absent = {"ascend": "MindIE-SD", "diffusers": OCTAVO, "torchao": TORCHAO}
    return verdicts + [
        Verdict(consumer, "files", False, f"none for it. Calibrate with --format {view}")
        for view, consumer in absent.items()
        if view not in there and there
    ]


def views(directory: Path) -> dict[str, Path]:
    """The formats that are in a checkpoint, and where: in the directory itself, or in a folder of their name."""
    found = {"ascend": directory} if any(directory.glob("quant_model_description_*.json")) else {}
    for view, method in (("diffusers", QUANT_METHOD), ("torchao", "torchao")):
        for place in (directory, directory / view):
            if view not in found and _says(place, method):
                found[view] = place
    return found


def _says(place: Path, method: str) -> bool:
    try:
        return method_at(place) == method
    except OctavoError:
        return False


def _ascend(directory: Path) -> list[Verdict]:
    try:
        checkpoint = Checkpoint(directory)
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error)), *modes(directory)]
    return [*_octavo(checkpoint), *modes(directory), *mindie(checkpoint)]


def _octavo(checkpoint: Checkpoint) -> Iterator[Verdict]:
    names = checkpoint.layer_names
    try:
        found, corrections = {}, {}
        for name in names:
            layer = read_layer(checkpoint, name)
            scales, bias = shares(layer)
            if checkpoint.corrected(name):
                corrections[name], bias = correction_share(layer), 0.0
            found[name] = max(scales, bias)
        yield Verdict("octavo", "numbers", True, f"{len(names)} layers within bounds")
        worst = max(found, key=found.__getitem__, default="")
        share = found.get(worst, 0.0)
        fact = f"as npu_quant_matmul computes them, off by at most {share:.2f} of what rounding explains"
        yield Verdict("octavo", "integers", share <= 1.0, fact if share <= 1.0 else f"{fact} ({worst})")
        if corrections:
            worst = max(corrections, key=corrections.__getitem__)
            fact = f"{len(corrections)} layers, at most {corrections[worst]:.2%} of the largest sum there can be"
            sound = corrections[worst] <= 1.0
            yield Verdict("octavo", "bias corrections", sound, fact if sound else f"{fact} ({worst})")
    except OctavoError as error:
        yield Verdict("octavo", "numbers", False, str(error))
    described = set(checkpoint.description) - {"model_quant_type"}
    lost, bare = sorted(described - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - described)
    fact = f"{len(described)} described, all there"
    if lost or bare:
        fact = f"{(lost or bare)[0]} is {'described and missing' if lost else 'not described'}"
    yield Verdict("octavo", "description", not (lost or bare), fact)
