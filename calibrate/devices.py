"""Whether a device is there."""

import importlib

import torch

from .errors import CalibrateError


def check_device(device: str) -> torch.device:
    """The device of that name. torch_npu is imported for "npu" alone. Raises CalibrateError 7 when it is not there."""
    kind, _, index = device.partition(":")
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise CalibrateError("device npu: torch_npu is not installed. Install it or use cpu.", 7) from error
    if kind == "cuda" and not torch.backends.cuda.is_built():
        raise CalibrateError("device cuda: this torch has no CUDA. Install a CUDA build or use cpu.", 7)
    if kind != "cpu":
        module = torch.get_device_module(kind)
        count = module.device_count() if module.is_available() else 0
        if count == 0 or (index and int(index) >= count):
            raise CalibrateError(f"device {device}: there are {count}. Use one that is there, or cpu.", 7)
    return torch.device(device)
