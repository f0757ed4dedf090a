"""Checks an ascend checkpoint: Octavo reads the files and computes with the integers (for MindIE-SD see `mindie`)."""

from collections.abc import Iterator
from pathlib import Path

from octavo.capture.errors import OctavoError

from ..arithmetic import correction_share, shares
from ..verdict import Verdict
from .checkpoint import Checkpoint
from .mindie import check_modes, mindie
from .numbers import read_numbers


def check(directory: Path) -> list[Verdict]:
    """The verdicts of Octavo's own reader and of MindIE-SD on a directory."""
    try:
        checkpoint = Checkpoint(directory)
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error)), *check_modes(directory)]
    return [*_octavo(checkpoint), *check_modes(directory), *mindie(checkpoint)]


def _octavo(checkpoint: Checkpoint) -> Iterator[Verdict]:
    names = checkpoint.layer_names
    try:
        found, corrections = {}, {}
        for name in names:
            layer = read_numbers(checkpoint, name).integers
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
