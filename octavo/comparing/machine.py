"""Describes the machine and the libraries that a comparison ran on."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")  # exists on Linux only


def surroundings(device: torch.device) -> dict[str, str]:
    """Returns a dict from fact to text: the date (UTC, to the minute), the versions of the libraries, the processor
    with its number of threads, and the device if it is not a CPU."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("octavo", "torch", "diffusers", "transformers")),
        "processor": f"{_processor()}, {torch.get_num_threads()} threads",
    }
    if device.type != "cpu":
        facts["device"] = f"{device}, {torch.get_device_module(device).get_device_name(device)}"
    return facts


def _processor() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
