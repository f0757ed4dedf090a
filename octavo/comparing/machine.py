"""Names what a comparison ran with: the machine, the versions, the dtypes."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

_PROCESSORS = Path("/proc/cpuinfo")  # Linux


def surroundings(device: torch.device) -> dict[str, str]:
    """The date (UTC, to the minute), versions of the libraries that compute, the processor, threads and device."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("octavo", "torch", "diffusers", "transformers")),
        "processor": f"{_processor()}, {torch.get_num_threads()} threads",
    }
    if device.type != "cpu":
        facts["device"] = f"{device}, {torch.get_device_module(device).get_device_name(device)}"
    return facts


def _processor() -> str:
    lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
