"""Integer layers that run on the fastest backend of their input's device."""

from types import ModuleType

import torch
from torch import Tensor, nn

from . import compiled, cpu, cuda, npu, reference
from .int8_layer import Conv2dState, Int8Layer, LinearState

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "npu": npu, "reference": reference}


def backend_of(layer: Int8Layer, x: Tensor) -> ModuleType:
    """Returns the backend, a module, that computes `layer` for the input `x`.

    In a graph of torch.compile, `compiled` replaces `cpu`, because Inductor cannot trace a packed weight.
    """
    backend = BACKENDS.get(layer.backend or x.device.type, reference)
    return compiled if backend is cpu and torch.compiler.is_compiling() and compiled.supports(layer) else backend


class Int8Linear(LinearState):
    """A QuantizedLinear that runs on the fastest backend of its input's device."""

    def forward(self, input: Tensor, gelu: str | None = None) -> Tensor:
        """Returns the output, in the input's dtype. `gelu`: None, or "none" or "tanh", the name of torch's
        approximation; GELU of the output is then returned."""
        y: Tensor = backend_of(self, input).linear(self, input, gelu)
        return y


class Int8Conv2d(Conv2dState):
    """A QuantizedConv2d that runs on the fastest backend of its input's device."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = backend_of(self, input).conv2d(self, input)
        return y


class Int8GELU(nn.Module):
    """An Int8Linear and the GELU of its output, computed in one pass. Takes the place of diffusers' module GELU, and
    has tensors of the same names."""

    def __init__(self, proj: Int8Linear, approximate: str) -> None:
        super().__init__()
        self.proj, self.approximate = proj, approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = self.proj(hidden_states, gelu=self.approximate)
        return y
