"""Integer layers whose forward calls the backend for their input's device."""

from types import ModuleType

import torch
from torch import Tensor, nn

from . import compiled, cpu, cuda, float_codes, npu, reference
from .int8_layer import Conv2dState, Int8Layer, LinearState

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "npu": npu, "reference": reference}


def backend_of(layer: Int8Layer, x: Tensor) -> ModuleType:
    """Returns the backend, a module, that computes `layer` for the input `x`: the one that `layer.backend` names, else
    the backend for the device of `x`, else the reference backend. A layer with FP8 codes is computed by `float_codes`
    on every device, except where the layer names the reference backend.

    In a graph of torch.compile, the module `compiled` replaces `cpu` for layers that it supports, because torch.compile
    cannot trace a packed weight.
    """
    if not layer.integer:
        return reference if layer.backend == "reference" else float_codes
    backend = BACKENDS.get(layer.backend or x.device.type, reference)
    return compiled if backend is cpu and torch.compiler.is_compiling() and compiled.supports(layer) else backend


class Int8Linear(LinearState):
    """A QuantizedLinear that runs on the backend `backend`. If `backend` is None, it runs on the backend for the device
    of its input."""

    def forward(self, input: Tensor, gelu: str | None = None) -> Tensor:
        """Returns the output of the layer for a float `input` (..., in), in the input's dtype. If `gelu` is not None,
        returns GELU of the output; `gelu` is then the argument `approximate` of F.gelu, "none" or "tanh"."""
        y: Tensor = backend_of(self, input).linear(self, input, gelu)
        return y


class Int8Conv2d(Conv2dState):
    """A QuantizedConv2d that runs on the backend `backend`. If `backend` is None, it runs on the backend for the device
    of its input."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = backend_of(self, input).conv2d(self, input)
        return y


class Int8GELU(nn.Module):
    """Computes the linear layer `proj` and GELU of its output in one pass. Takes the place of diffusers' module GELU,
    and has tensors of the same names. `approximate`, "none" or "tanh", is the argument of this name of F.gelu."""

    def __init__(self, proj: Int8Linear, approximate: str) -> None:
        super().__init__()
        self.proj, self.approximate = proj, approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = self.proj(hidden_states, gelu=self.approximate)
        return y
