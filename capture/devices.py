"""Converts names of devices and dtypes to torch's objects, and refuses devices that this machine does not have."""

import importlib

import torch

from .errors import DeviceError, UsageError

# the dtypes of models, by the names that options accept
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """Returns the device with this name: auto, cpu, cuda or npu, optionally with an index, as in cuda:1.

    auto is cuda where it is available, else cpu. Raises DeviceError if this machine or this build of torch lacks the
    device, UsageError for any other name.
    """
    kind, _, index = name.partition(":")
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("cuda", "npu") or (index and not index.isdecimal()):
        raise UsageError(f"device: '{name}' is not a device. Choose auto, cpu, cuda or npu.")
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError:
            raise DeviceError("device npu: torch_npu is not installed. Install it or use cpu.") from None
    elif not torch.backends.cuda.is_built():
        raise DeviceError("device cuda: this torch has no CUDA. Install a CUDA build or use cpu.")
    count = getattr(torch, kind).device_count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {name}: this machine has {count} {kind} devices. Choose another device.")
    return torch.device(kind, int(index or 0))
