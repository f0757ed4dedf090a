"""Checks whether an ascend checkpoint is sound, with Octavo's own reader and arithmetic. The module `mindie` checks
whether MindIE-SD can load it."""

from collections.abc import Iterator
from pathlib import Path

from octavo.capture.errors import OctavoError

from ...layers.schemes import MXFP8
from ..arithmetic import correction_ratio, error_ratios
from ..verdict import Verdict
from .checkpoint import Checkpoint
from .mindie import check_modes, mindie
from .names import MODEL_TYPE, QUANT_TYPE
from .numbers import read_numbers


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on the checkpoint in `directory`: whether Octavo's reader accepts it, and whether MindIE-SD
    would load it. Files that cannot be read give a negative verdict, not an error."""
    try:
        checkpoint = Checkpoint(directory)
    except OctavoError as error:
        return [Verdict("octavo", "files", False, str(error)), *check_modes(directory)]
    return [*_octavo_verdicts(checkpoint), *check_modes(directory), *mindie(checkpoint)]


def _octavo_verdicts(checkpoint: Checkpoint) -> Iterator[Verdict]:
    names = checkpoint.layer_names
    try:
        ratios, corrections = {}, {}
        for name in names:
            layer = read_numbers(checkpoint, name).integers
            scales, bias = error_ratios(layer)
            if checkpoint.has_bias_correction(name):
                corrections[name], bias = correction_ratio(layer), 0.0
            ratios[name] = max(scales, bias)
        blocks = set(checkpoint.schemes.values()) == {MXFP8}
        yield Verdict("octavo", "numbers", True, f"all numbers of {len(names)} layers are within bounds")
        worst = max(ratios, key=ratios.__getitem__, default="")
        ratio = ratios.get(worst, 0.0)
        subject, way = ("codes", "in float32") if blocks else ("integers", "as npu_quant_matmul does")
        fact = f"computed {way}, the largest error is {ratio:.2f} of what rounding can cause"
        yield Verdict("octavo", subject, ratio <= 1.0, fact if ratio <= 1.0 else f"{fact} ({worst})")
        if corrections:
            worst = max(corrections, key=corrections.__getitem__)
            largest = f"{corrections[worst]:.2%} of the largest sum that the layer can have"
            fact = f"{len(corrections)} layers have one, at most {largest}"
            sound = corrections[worst] <= 1.0
            yield Verdict("octavo", "bias corrections", sound, fact if sound else f"{fact} ({worst})")
    except OctavoError as error:
        yield Verdict("octavo", "numbers", False, str(error))
    types = {f"{module}.{QUANT_TYPE}" for module in checkpoint.attention}
    described = set(checkpoint.description) - {MODEL_TYPE, *types}
    missing, surplus = sorted(described - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - described)
    fact = f"all {len(described)} described tensors are there, and no others"
    if missing or surplus:
        fact = f"{(missing or surplus)[0]} is {'described but missing' if missing else 'not described'}"
    yield Verdict("octavo", "description", not (missing or surplus), fact)
