"""Compares an ascend checkpoint with a float model, to find out whether the checkpoint was made from that model."""

import torch
from torch import nn

from octavo.capture.tensors import read_tensor

from ...layers.schemes import RANGED
from .checkpoint import Checkpoint

CLOSE = 0.01  # relative tolerance for float tensors; rounding to bfloat16 changes a value by at most 0.4 %


def difference(checkpoint: Checkpoint, model: nn.Module) -> str | None:
    """Returns a fact, in words, that shows that the checkpoint was not made from the float `model`, such as a layer
    that the model lacks; None if there is no such fact.

    Compares the names of the integer layers, the shapes of their weights, and the values of the float tensors. A value
    may differ by 1 % of the model's value, because writing rounds it. Biases that may include a bias correction are not
    compared: those of layers without quant_bias.
    """
    corrected = {f"{name}.bias" for name, scheme in checkpoint.schemes.items() if scheme not in RANGED}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in checkpoint.layer_names:
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            return f"it has no linear or convolution {name}"
        stored = checkpoint.tensors[f"{checkpoint.prefix(name)}weight"].shape
        if stored != tuple(layer.weight.shape):
            return f"{name} has the shape {list(layer.weight.shape)}, not {list(stored)}"
    for name, tensor in model.state_dict().items():
        if name not in corrected and checkpoint.description.get(name) == "FLOAT" and tensor.is_floating_point():
            stored_tensor = checkpoint.tensors.get(name)
            if stored_tensor is None or stored_tensor.shape != tuple(tensor.shape):
                return f"{name} has another shape"
            values = read_tensor(checkpoint.weight_path, stored_tensor).float()
            if not torch.allclose(values, tensor.float().cpu(), rtol=CLOSE, atol=1e-6):
                return f"{name} has other values"
    return None
