"""Resolves names of devices and dtypes, and refuses devices that the machine lacks."""

import importlib

import torch

from .errors import DeviceError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda, npu, with an index where wanted.

    Raises DeviceError when this machine or this torch does not have it, UsageError when there is no such kind.
    """
    kind, _, index = name.partition(":")
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("cuda", "npu") or (index and not index.isdecimal()):
        raise UsageError(f"device {name}: not a device. Choose auto, cpu, cuda or npu.")
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError:
            raise DeviceError("device npu: torch_npu is not installed. Install it or use cpu.") from None
    elif not torch.backends.cuda.is_built():
        raise DeviceError("device cuda: this torch has no CUDA. Install a CUDA build or use cpu.")
    count = getattr(torch, kind).device_count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {name}: this machine has {count} of them. Choose another device.")
    return torch.device(kind, int(index or 0))
