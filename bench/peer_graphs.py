"""Writes ONNX graphs of a quantized SD3: with onnxruntime's quantize_dynamic, and as QDQ with Octavo's scales."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.calibrate.layers.install import names_of, replace
from octavo.calibrate.layers.modules import QuantizedLinear

from .bench_runtime import call_of

_CODES = torch.ops.quantized_decomposed


class Graph(nn.Module):
    """Wraps the model so that its forward takes only tensors and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        tensors = hidden_states, encoder_hidden_states, pooled_projections, timestep
        output: Tensor = self.model(*tensors, return_dict=False)[0]
        return output


class QDQ(nn.Module):
    """A linear layer with QuantizeLinear and DequantizeLinear operators around a float32 product.

    The input is quantized to uint8, the weight to int8.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.scale, self.zero_point = float(layer.input_scale), int(layer.input_zero_point) + 128
        self.register_buffer("codes", layer.weight.detach().t().contiguous())  # (in, out), the layout of MatMul
        self.register_buffer("scales", layer.weight_scale.detach())
        self.register_buffer("zeros", torch.zeros(layer.out_features, dtype=torch.int64))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        to = self.scale, self.zero_point, 0, 255, torch.uint8
        q = _CODES.quantize_per_tensor(x, *to)
        weight = _CODES.dequantize_per_channel(self.codes, self.scales, self.zeros, 1, -127, 127, torch.int8)
        y = _CODES.dequantize_per_tensor(q, *to) @ weight
        return y if self.bias is None else y + self.bias


def inputs_of(tokens: int) -> dict[str, Tensor]:
    """Makes the inputs of a graph for a number of tokens, by name."""
    return {name: value for name, value in call_of(tokens).kwargs.items() if isinstance(value, Tensor)}


def static_graph(folder: Path, model: nn.Module, integer: nn.Module, tokens: int) -> Path:
    """Writes a QDQ graph with Octavo's scales, unless it exists; returns its path."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (defines the operators)

    file = folder / f"qdq{tokens}.onnx"
    if not file.exists():
        layers = {name: module for name, module in integer.named_modules() if isinstance(module, QuantizedLinear)}
        for first, names in names_of(model).items():
            for name in names if first in layers else ():
                replace(model, name, QDQ(layers[first]))
        _export(model, tokens, file)
    return file


def dynamic_graph(folder: Path, model: nn.Module, tokens: int, layers: set[str]) -> Path:
    """Writes a graph whose activations onnxruntime quantizes at run time, unless it exists; returns its path."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file, plain = folder / f"dynamic{tokens}.onnx", folder / f"plain{tokens}.onnx"
    if not file.exists():
        _export(model, tokens, plain)
        quantize_dynamic(
            plain, file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=_others(plain, layers), use_external_data_format=True,
        )  # fmt: skip
    return file


def _others(file: Path, layers: set[str]) -> list[str]:
    """Returns the names of the nodes that multiply matrices but do not belong to any of the layers."""
    import onnx

    names = []
    for node in onnx.load(file, load_external_data=False).graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
        if node.op_type in ("MatMul", "Gemm") and not any(f"'model.{name}'" in scopes for name in layers):
            names += [node.name, node.name + "_MatMul"]  # quantize_dynamic renames a Gemm to the second
    return names


def _export(model: nn.Module, tokens: int, file: Path) -> None:
    inputs = copy.deepcopy(inputs_of(tokens))
    torch.onnx.export(Graph(model).eval(), (), file, kwargs=inputs, dynamo=True, external_data=True, verbose=False)
