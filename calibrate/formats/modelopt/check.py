"""Checks whether vLLM-Omni and SGLang-diffusion can load a transformer directory in the layout of ModelOpt, whether
Octavo or another tool wrote it. Also reports faults that change the output of the model without an error. The rules are
those in the sources of vLLM-Omni and SGLang."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from octavo.capture.errors import OctavoError

from ..e4m3 import is_nan
from ..verdict import Verdict
from .check_sglang import sglang_verdicts
from .check_vllm_omni import vllm_omni_verdicts
from .files import INPUT_SCALE, VLLM_NAME, WEIGHT, WEIGHT_SCALE, Files


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether vLLM-Omni and SGLang can load `directory`, whose config.json has the quant_method
    "modelopt". Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Files.open(directory)))
    except OctavoError as error:
        return [Verdict(VLLM_NAME, "files", False, str(error))]


def _verdicts(files: Files) -> Iterator[Verdict]:
    fact = next((fault for name in files.codes if (fault := _fault(files, name))), "")
    sound = "all codes are numbers, and all scales are positive and finite"
    yield Verdict("octavo", "codes", not fact, fact or sound)
    yield from vllm_omni_verdicts(files)
    yield from sglang_verdicts(files)


def _fault(files: Files, name: str) -> str | None:
    """Returns what is wrong with the numbers of the FP8 layer `name`; None if nothing is."""
    if bool(is_nan(files.model.tensors[name + WEIGHT].bits()).any()):
        return f"{name}{WEIGHT} has codes that are NaN"
    for key in (name + WEIGHT_SCALE, name + INPUT_SCALE):
        tensor = files.model.tensors.get(key)
        if tensor is not None and tensor.stored.dtype == "float32":
            scales = tensor.read()
            if not bool(((scales > 0) & np.isfinite(scales)).all()):
                return f"{key} is not positive and finite"
    return None
