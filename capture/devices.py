"""Names of devices and dtypes, and what a machine lacks of them."""

import importlib

import torch

from .errors import PipelineError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda, npu, with an index where wanted.

    Raises PipelineError 7 when this machine or this torch does not have it, 2 when there is no such kind.
    """
    kind, _, index = name.partition(":")
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("cuda", "npu") or (index and not index.isdecimal()):
        raise PipelineError(f"device {name}: not a device. Choose auto, cpu, cuda or npu.", 2)
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError:
            raise PipelineError("device npu: torch_npu is not installed. Install it or use cpu.", 7) from None
    elif not torch.backends.cuda.is_built():
        raise PipelineError("device cuda: this torch has no CUDA. Install a CUDA build or use cpu.", 7)
    count = getattr(torch, kind).device_count()
    if int(index or 0) >= count:
        raise PipelineError(f"device {name}: this machine has {count} of them. Choose another device.", 7)
    return torch.device(kind, int(index or 0))
