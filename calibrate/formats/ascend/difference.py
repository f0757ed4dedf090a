"""Tells whether an ascend checkpoint was made from a given float model."""

import torch
from torch import nn

from octavo.capture.tensors import read_tensor

from .checkpoint import Checkpoint

CLOSE = 0.01  # relative tolerance of float tensors: rounding to bfloat16 changes a value by at most 0.4 %


def difference(checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """The first sign that a checkpoint was not made from the float `model`; None where there is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in checkpoint.layer_names:
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            return f"it has no layer {name}"
        stored = checkpoint.tensors[f"{checkpoint.prefix(name)}weight"].shape
        if stored != tuple(layer.weight.shape):
            return f"{name} is {list(layer.weight.shape)} and not {list(stored)}"
    for name, tensor in model.state_dict().items():
        if checkpoint.description.get(name) == "FLOAT" and tensor.is_floating_point():
            stored_tensor = checkpoint.tensors.get(name)
            if stored_tensor is None or stored_tensor.shape != tuple(tensor.shape):
                return f"{name} has another shape"
            read = read_tensor(checkpoint.weight_path, stored_tensor).float()
            if not torch.allclose(read, tensor.float().cpu(), rtol=CLOSE, atol=1e-6):
                return f"{name} has other values"
    return None
