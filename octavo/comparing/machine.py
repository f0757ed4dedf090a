"""Describes the machine and the libraries that a comparison ran on."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from octavo.calibrate.runtime.attention import DTYPES
from octavo.calibrate.runtime.choice import describe, times_of

_CPUINFO = Path("/proc/cpuinfo")  # exists on Linux only


# instruction set -> function of torch.cpu that returns whether the processor has it
_SETS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "VNNI": "_is_vnni_supported",
    "AVX512_BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}


def surroundings(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Returns a dict from fact to text: the date (UTC, to the minute), the versions of the libraries, and the processor
    with its number of threads. If `device` is a CPU, the kernels that were chosen for models of `dtype` are added. If
    it is another device, such as a GPU, the name of the device is added."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("octavo", "torch", "diffusers", "transformers")),
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
    }
    if device.type != "cpu":
        facts["device"] = f"{device}, {torch.get_device_module(device).get_device_name(device)}"
    elif dtype in DTYPES:
        facts["chosen kernels"] = describe(dtype, times_of(dtype))
    return facts


def instruction_sets() -> dict[str, bool]:
    """Returns whether the processor has each of the instruction sets that kernels of torch or Octavo use, as a dict
    from the name of the set to a bool."""
    return {name: bool(getattr(torch.cpu, question)()) for name, question in _SETS.items()}


def processor() -> str:
    """Returns the name of the processor, such as that in /proc/cpuinfo, or its architecture if the name is unknown."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
