"""Measures how fast this processor multiplies matrices, for `octavo doctor`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..layers.products import sums_in_int32
from ..native import kernels
from .choice import measure, one_thread

_ROWS, _IN, _OUT = 512, 768, 768  # sizes of the linear layer


@torch.no_grad()
def rates() -> dict[str, float]:
    """Measures a linear layer of fixed sizes in three dtypes. Returns a dict from "float32", "bfloat16" and "int8" to
    the operations per second of one thread; 0 for a dtype in which this processor cannot run the layer. A
    multiplication and an addition are two operations."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, _IN, generator=generator) for rows in (_ROWS, _OUT))
    narrow = x.bfloat16(), weight.bfloat16()
    functions: dict[str, Callable[[], Any]] = {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(*narrow),
    }
    with one_thread():
        seconds = measure(functions | _int8(generator))
    seconds = {name: seconds.get(name, float("inf")) for name in ("float32", "bfloat16", "int8")}
    return {name: 2 * _ROWS * _IN * _OUT / value for name, value in seconds.items()}


def _int8(generator: torch.Generator) -> dict[str, Callable[[], Any]]:
    """Returns a dict with one entry, from "int8" to a function that multiplies a uint8 matrix by an int8 matrix as
    integer layers do on this processor. Returns an empty dict if integer layers run on the reference backend here.
    `generator` draws the matrices."""
    codes = torch.randint(0, 256, (_ROWS, _IN), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-127, 128, (_OUT, _IN), dtype=torch.int8, generator=generator)
    if not sums_in_int32():
        library = kernels.library()
        if library is None:
            return {}
        return {"int8": partial(library.linear(weight, None, torch.ones(_OUT)), codes, torch.float32)}
    numbers = torch.ones(_OUT), torch.zeros(_OUT, dtype=torch.int64), None
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    more: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    return {"int8": lambda: torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, *numbers, *more)}
