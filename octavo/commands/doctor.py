"""Runs `octavo doctor`: shows what this machine has, how fast its processor was measured to be, which kernels Octavo
chose, and what would be quicker."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from octavo.calibrate.layers.products import sums_in_int32
from octavo.calibrate.native import kernels
from octavo.calibrate.runtime.attention import CANDIDATES, DTYPES
from octavo.calibrate.runtime.choice import choose_attention, fastest, times_of
from octavo.calibrate.runtime.rates import rates
from octavo.capture.tensors import dtype_name

from ..comparing.machine import instruction_sets, processor
from ..terminal import Terminal
from .machine_facts import EXTRAS, advice, extras, facts, text_of


def run(terminal: Terminal) -> None:
    """Runs `octavo doctor`: prints the facts, the measured rates, the chosen kernels and advice on `terminal`."""
    sets, found = instruction_sets(), facts()
    processor_facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction sets": ", ".join(name for name, there in sets.items() if there) or "none of " + ", ".join(sets),
        "compiled kernels": _kernels(),
        "integer layers": _integer_layers(),
    }
    rows = [[name, str(value)] for name, value in (text_of(found) | processor_facts).items()]
    terminal.table("This machine", ["fact", "value"], rows)
    terminal.event("machine", **found, **processor_facts)
    _show_extras(terminal)
    measured = _show_rates(terminal)
    _show_attention(terminal)
    _show_float_layers(terminal)
    sentences = list(advice(found, measured, torch.get_num_threads(), os.cpu_count() or 1))
    for sentence in sentences:
        terminal.say(sentence)
    terminal.event("advice", sentences=sentences)
    terminal.next("capture", "demo", "captured", "--limit", "8")


def _show_extras(terminal: Terminal) -> None:
    installed = extras()
    rows = [
        [name, EXTRAS[name][0], "installed" if there else f"pip install 'octavo[{name}]'"]
        for name, there in installed.items()
    ]
    terminal.table("Extras", ["extra", "for", "state"], rows)
    terminal.event("extras", **installed)


def _kernels() -> str:
    library = kernels.library()
    if library is None:
        return str(kernels.absence()).replace(str(kernels.LIBRARY), kernels.LIBRARY.name)
    return f"{library.target}, of {', '.join(kernels.targets())}"


def _integer_layers() -> str:
    if sums_in_int32():
        return "oneDNN"
    if kernels.library() is not None:
        return "Octavo's kernel, since oneDNN's sums saturate without VNNI"
    return "the exact reference, slowly: the processor has no VNNI, and Octavo no compiled kernels"


def _show_rates(terminal: Terminal) -> Mapping[str, float | None]:
    """Prints the measured operations per second of a linear layer in each dtype, and returns them."""
    measured = rates()
    terminal.table(
        "Linear layers",
        ["dtype", "rate"],
        [[name, f"{rate / 1e9:.0f} {_unit(name)}" if rate else "cannot run"] for name, rate in measured.items()],
    )
    rounded: dict[str, Any] = {name: round(rate) for name, rate in measured.items()}
    terminal.event("rates", **rounded)
    return measured


def _unit(dtype: str) -> str:
    return "GOPS" if dtype == "int8" else "GFLOPS"


def _show_attention(terminal: Terminal) -> None:
    rows = []
    for dtype in DTYPES:
        name, times = dtype_name(dtype), times_of(dtype)
        for size, seconds in times.attention.items():
            choice = choose_attention(times, size)
            rows.append([name, size, *(_milliseconds(seconds, each) for each in CANDIDATES), choice])
            terminal.event("attention", dtype=name, size=size, seconds=_finite(seconds), choice=choice)
    terminal.table("Attention, milliseconds of each candidate", ["dtype", "size", *CANDIDATES, "choice"], rows)


def _show_float_layers(terminal: Terminal) -> None:
    rows = []
    for dtype in DTYPES[1:]:
        name = dtype_name(dtype)
        for kind, seconds in times_of(dtype).products.items():
            choice = fastest(seconds)
            rows.append([name, kind, *(_milliseconds(seconds, each) for each in (name, "float32")), choice])
            terminal.event("float_layers", dtype=name, layer=kind, seconds=_finite(seconds), choice=choice)
    columns = ["dtype", "layer", "in its dtype", "in float32", "choice"]
    terminal.table("Layers that stay float, milliseconds in each dtype", columns, rows)


def _milliseconds(seconds: Mapping[str, float], name: str) -> str:
    value = seconds.get(name, math.inf)
    return f"{1000 * value:.2f}" if value < math.inf else "-"


def _finite(seconds: Mapping[str, float]) -> dict[str, float | None]:
    """Returns a dict from the name of a candidate to its measured time in `seconds`. Candidates are kernels or dtypes
    in which the same operation can be computed. The time of a candidate that cannot run here is infinity in `seconds`,
    and None in the result."""
    return {name: round(value, 7) if value < math.inf else None for name, value in seconds.items()}
