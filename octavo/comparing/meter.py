"""Measures the seconds and the memory of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Taken:
    """The cost of a run.

    `peak`: the most memory in bytes while it ran, of the device, or on a CPU of the whole process; None: unknown.
    """

    seconds: float = 0.0
    peak: int | None = None


@contextmanager
def taken(device: torch.device) -> Iterator[Taken]:
    """Measures a block; the values are set when the block has ended."""
    cost = Taken()
    accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
    known = _forget_peak() if accelerator is None else True
    if accelerator is not None:
        accelerator.synchronize(device)
        accelerator.reset_peak_memory_stats(device)
    began = time.perf_counter()
    yield cost
    if accelerator is not None:
        accelerator.synchronize(device)
    cost.seconds = time.perf_counter() - began
    if accelerator is not None:
        cost.peak = int(accelerator.max_memory_allocated(device))
    elif known:
        cost.peak = int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _forget_peak() -> bool:
    """Sets the kernel's high-water mark of this process back to what it holds now (Linux, proc(5)); False: cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
