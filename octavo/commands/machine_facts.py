"""Says, for `octavo doctor`, what this machine has, and what would make Octavo quicker or more able on it."""

import importlib.util
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from octavo.calibrate.native import kernels
from octavo.capture.progress import size

LIBRARIES = ("octavo", "torch", "diffusers", "transformers", "accelerate", "safetensors")
# extra of pyproject.toml -> what it is for, and the modules that it installs
EXTRAS = {
    "npu": ("Ascend NPUs", ("torch_npu",)),
    "triton": ("integer layers on NVIDIA GPUs", ("triton",)),
    "onnx": ("the formats onnx and ascend-onnx", ("onnx", "onnxruntime", "onnxscript")),
    "lora": ("--lora", ("peft",)),
    "metrics": ("more measures of compare", ("stlpips_pytorch", "flip_evaluator", "rapidocr", "onnxruntime")),
    "opensora": ("prompts of Open-Sora", ("ftfy", "bs4", "sentencepiece", "google.protobuf")),
}
_MEMORY = Path("/proc/meminfo")  # exists on Linux only
_ASCEND, _NVIDIA = Path("/dev/davinci0"), Path("/dev/nvidia0")  # the files of the first card of each kind


def facts() -> dict[str, Any]:
    """Returns a dict from fact to value: versions, devices, compiler, memory and disk. Numbers are bytes. There are no
    paths and no names of users among the values."""
    return {
        "versions": {name: version_of(name) for name in ("python", *LIBRARIES)},
        "system": f"{platform.system()} {platform.machine()}",
        "devices": devices(),
        "compiler": compiler(),
        "memory": memory(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
    }


def version_of(name: str) -> str:
    """Returns the version of Python or of an installed package; "missing" if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def devices() -> list[dict[str, Any]]:
    """Returns a description of each GPU and NPU that torch can use: its kind, name and bytes of memory."""
    found = []
    modules: dict[str, Any] = {kind: getattr(torch, kind, None) for kind in ("cuda", "npu")}
    for kind, module in modules.items():
        for index in range(module.device_count() if module is not None and module.is_available() else 0):
            properties = module.get_device_properties(index)
            found.append({"device": f"{kind}:{index}", "name": properties.name, "memory": properties.total_memory})
    return found


def compiler() -> str | None:
    """Returns the name of the C compiler with which pip compiles Octavo's kernels; None if there is none."""
    words = shlex.split(os.environ.get("CC", "cc"))
    return Path(words[0]).name if words and shutil.which(words[0]) else None


def memory() -> dict[str, int]:
    """Returns the bytes of main memory of this machine, `total` and `available`; {} where the system does not say."""
    if not _MEMORY.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
    names = {"total": "MemTotal", "available": "MemAvailable"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items() if key in lines}


def extras() -> dict[str, bool]:
    """Returns whether everything that an extra of Octavo installs is there, as a dict from the extra to a bool."""
    return {name: all(map(_is_installed, modules)) for name, (_, modules) in EXTRAS.items()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold `module` is missing
        return False


def text_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns what `facts` returned as texts for people."""
    versions, memory_, cards = values["versions"], values["memory"], values["devices"]
    return {
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "system": values["system"],
        "devices": ", ".join(f"{card['device']} ({card['name']}, {size(card['memory'])})" for card in cards)
        or "no GPU or NPU that torch can use",
        "compiler": values["compiler"] or "none",
        "memory": f"{size(memory_['available'])} of {size(memory_['total'])} available" if memory_ else "unknown",
        "disk here": f"{size(values['disk_free'])} free",
    }


def advice(values: Mapping[str, Any], rates: Mapping[str, float | None], threads: int, cores: int) -> Iterator[str]:
    """Yields a sentence for each thing that would make Octavo quicker on this machine, with what to do.

    `values` is what `facts` returned; `rates` maps dtypes to the measured operations per second of a linear layer, None
    or 0 where the dtype cannot run; `threads` is the number of threads of torch, `cores` that of the processor.
    """
    absence = kernels.absence()
    if absence is not None and "processor" not in absence:
        yield missing_kernels(values["compiler"], os.environ.get("OCTAVO_KERNELS") == "none")
    if threads < cores:
        yield f"torch uses {threads} of {cores} cores. Set OMP_NUM_THREADS to {cores}, unless others need the cores."
    if not values["devices"]:
        if _NVIDIA.exists():
            yield "There is an NVIDIA GPU that this torch cannot use. Install torch for CUDA."
        if _ASCEND.exists():
            yield "There is an Ascend NPU that this torch cannot use. Run pip install 'octavo[npu]'."
    elif any(card["device"].startswith("cuda") for card in values["devices"]) and not _is_installed("triton"):
        yield "Integer layers run without Triton on the GPU. Run pip install 'octavo[triton]'."
    slow, quick = rates.get("bfloat16") or 0.0, rates.get("float32") or 0.0
    if not values["devices"] and slow < quick:
        yield "bfloat16 is slower than float32 on this processor. Use --dtype float32 where the memory allows it."


def missing_kernels(compiler: str | None, switched_off: bool) -> str:
    """Returns the sentence that says how to get the compiled kernels, which are not loaded. `compiler` is the name of
    the C compiler that pip would use, such as "cc", or None if there is none. `switched_off` says whether the
    environment variable OCTAVO_KERNELS is "none"."""
    slow = "so models in integers run more slowly"
    if switched_off:
        return f"The compiled kernels are switched off, {slow}. Unset OCTAVO_KERNELS."
    remedy = "Install Octavo again" if compiler else "Install a C compiler such as gcc, then Octavo again"
    return f"The compiled kernels are missing, {slow}. {remedy}."
