"""Measures the seconds and the peak memory of the statements inside a `with` statement."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """The cost of a run: its seconds, and `peak`, the peak memory in bytes.

    On a CPU, `peak` is the peak memory of the whole process, on another device the peak memory of PyTorch on this
    device. `peak` is None if the system did not allow measuring it.
    """

    seconds: float = 0.0
    peak: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measures the seconds and the peak memory of the body of `with`, which computes on `device`. The fields of the
    yielded `Cost` are set when the body ends."""
    cost = Cost()
    accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
    peak_was_reset = _reset_peak() if accelerator is None else True
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
    elif peak_was_reset:
        cost.peak = int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _reset_peak() -> bool:
    """Sets the peak memory that Linux records of this process (VmHWM, see proc(5)) back to its current memory. Returns
    whether the system allowed it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
