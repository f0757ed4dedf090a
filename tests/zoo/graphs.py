"""Small networks as ONNX graphs, and functions that run graphs with onnxruntime and the evaluator of Ascend's
graphs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.onnx.ascend_evaluator import AscendGraph
from octavo.calibrate.formats.onnx.ascend_graph import ascend
from octavo.calibrate.formats.onnx.ascend_operators import ascend_operators
from octavo.calibrate.formats.onnx.qdq_graph import qdq
from octavo.calibrate.formats.onnx.trace import EXPORTERS, trace
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.layers.products import sums_in_int32
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import Settings

OLDER = EXPORTERS[-1:]  # the older exporter traces a layer some 50 times as fast
NAME = "input.1"


class Mixed(nn.Module):
    """A network with layers of every kind, from pictures (batch, 3, 12, 12) to numbers (batch, 8).

    Some layers are used twice, and some on inputs with another number of axes.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.around = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, 2, padding=2, dilation=2, groups=4, bias=False)
        self.twice = nn.Conv2d(8, 8, (3, 1), padding="same")
        self.bare = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.alias = self.bare
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.around(x).relu())
        y = self.twice(y) + self.twice(y.relu())
        y = self.up(y)
        tokens = y.flatten(2).transpose(1, 2)
        tokens = self.again(self.bare(tokens) + tokens) + self.alias(tokens.relu())
        return self.again(tokens.mean(1))


def mixed_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Calibrates a Mixed and returns its integer layers."""
    data = [Sample((x,), {}) for x in pictures(4)]
    return calibrate(model, lambda: data, Settings(defaults={}, reciprocal=True)).layers


def pictures(count: int, seed: int = 0, size: int = 12) -> list[Tensor]:
    """Returns random batches of three pictures."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 3, size, size, generator=generator) for _ in range(count)]


def integers(model: nn.Module, layers: Mapping[str, QuantizedLayer], x: Tensor) -> np.ndarray[Any, Any]:
    """Returns the output of the model with these integer layers."""
    with torch.no_grad(), quantized(model, layers):
        return model(x).numpy()


def older(model: nn.Module, layers: Mapping[str, QuantizedLayer], x: Tensor) -> ModelProto:
    """Traces a model with torch's older exporter, which is some 50 times as fast for a layer."""
    return trace(model, layers, Sample((x,), {}), exporters=OLDER)


def on_runtime(proto: ModelProto, x: Tensor) -> np.ndarray[Any, Any]:
    """Checks a graph with onnx and returns its output in onnxruntime."""
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not sums_in_int32():  # integer products would saturate in int16 on this CPU, so onnxruntime computes in float
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def on_ascend(proto: ModelProto, x: Tensor) -> np.ndarray[Any, Any]:
    """Checks a graph with onnx and returns its output in the evaluator of Ascend's graphs."""
    with ascend_operators():
        onnx.checker.check_model(proto)
    return AscendGraph(proto)(**{proto.graph.input[0].name: x.numpy()})[0]


def both(traced: ModelProto, layers: Mapping[str, QuantizedLayer], x: Tensor) -> list[np.ndarray[Any, Any]]:
    """Returns the outputs of the QDQ graph in onnxruntime and of Ascend's graph in the evaluator."""
    return [on_runtime(qdq(traced, layers), x), on_ascend(ascend(traced, layers), x)]


def step(y: np.ndarray[Any, Any]) -> float:
    """Returns the size of one of the 255 steps of an output's range."""
    return float(max(y.max(), 0.0) - min(y.min(), 0.0)) / 255


def stored(proto: ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the initializers of a graph by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def by_hand(opset: int = 18, ir_version: int = 10, size: int = 8) -> ModelProto:
    """Builds a graph of y = x + weight, with `size` float32 weights."""
    weight = numpy_helper.from_array(np.arange(size, dtype=np.float32), "weight")
    around = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "weight"], ["y"])], "g", around[:1], around[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
