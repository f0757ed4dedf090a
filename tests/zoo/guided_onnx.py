"""Reads the denoiser of `guided_unet` from an ONNX graph that torch exported."""

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from .guided_unet import Consistency, GuidedUNet

PREFIX = "network."  # of the tensors that kept their names


def read_denoiser(path: Path) -> Consistency:
    """Builds the denoiser in the file `path`. Its linears and convolutions are found by name; norms, whose tensors lost
    their names, in the order in which the graph computes them.

    Raises ValueError for a graph whose norms do not fit the network.
    """
    graph = onnx.load(path).graph
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    tensors = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    network = GuidedUNet(tensors)
    network.load_state_dict({**network.state_dict(), **tensors})
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    found = _norms(graph, values)
    if [norm.num_channels for norm in norms] != [weight.numel() for weight, _ in found]:
        raise ValueError(f"{path}: its norms are not those of the network. Give a graph of guided-diffusion's UNet.")
    with torch.no_grad():
        for norm, (weight, bias) in zip(norms, found, strict=True):
            norm.weight.copy_(weight.flatten())
            norm.bias.copy_(bias.flatten())
    return Consistency(network).eval().requires_grad_(False)


def _norms(graph: onnx.GraphProto, values: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns weight and bias of each norm: the constants that the first Mul and Add behind it take."""
    found: list[tuple[Tensor, Tensor]] = []
    waiting = False
    weight: Tensor | None = None
    for node in graph.node:
        constants = [values[name] for name in node.input if name in values]
        if node.op_type == "InstanceNormalization":
            waiting = True
        elif waiting and node.op_type == "Mul":
            weight = constants[0]
        elif waiting and node.op_type == "Add" and weight is not None:
            found.append((weight, constants[0]))
            waiting, weight = False, None
    return found
