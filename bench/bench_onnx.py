"""Compares both kinds of ONNX graphs with Octavo's integer layers, and measures onnxruntime's speed with them.

    python -m bench.bench_onnx [--rounds 9] [--networks digits 18 50 mobilenet regnet convnext vit]

Times are medians of alternating runs of the QDQ graph and the float graph with one thread. `fused` counts the layers
that onnxruntime computes in int8. It only does so where the output of a layer is quantized too; a layer with an output
that is added to a residual is computed in float. `off by` is the largest difference of an output value, in units
of 1/255 of the outputs' range; `int8 off float` is the error of quantization itself in the same unit. `layers unequal`
counts the layers of Ascend's graph whose output differs by a bit from the integer layer's for the same input. If there
are none, all differences come from the float operators between the layers.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.onnx.ascend_evaluator import AscendGraph
from octavo.calibrate.formats.onnx.ascend_graph import ascend
from octavo.calibrate.formats.onnx.ascend_operators import DEQUANT, QUANT
from octavo.calibrate.formats.onnx.graph_builder import float_graph
from octavo.calibrate.formats.onnx.qdq_graph import qdq
from octavo.calibrate.formats.onnx.trace import trace
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.user_data import Sample
from tests.zoo.digits import bundled
from tests.zoo.resnet import resnet18, resnet50

Array = np.ndarray[Any, Any]
_NAME = "input.1"
_TRANSFORMERS = {"mobilenet": "mobilenet_v2", "regnet": "regnet", "convnext": "convnext", "vit": "vit"}
_INT8 = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def session(proto: onnx.ModelProto, optimized: Path) -> onnxruntime.InferenceSession:
    """Makes a session with one thread, and writes onnxruntime's optimized graph to the file `optimized`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def subject(name: str) -> tuple[nn.Module, Tensor]:
    """Makes the model with this name, and a batch of inputs for it."""
    if name == "digits":
        data = bundled()
        return data.model, data.training[:16]
    torch.manual_seed(0)
    x = torch.randn(1, 3, 224, 224)
    if name in _TRANSFORMERS:
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(_TRANSFORMERS[name]))
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):  # otherwise depthwise convolutions shrink their inputs to nothing
                nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    else:
        model = {"18": resnet18, "50": resnet50}[name]()
    return model.eval().requires_grad_(False), x


def seconds(sessions: list[onnxruntime.InferenceSession], x: np.ndarray[Any, Any], rounds: int) -> list[float]:
    """Measures the median seconds of a run of each session. The sessions run alternately."""
    seconds_of_session: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds + 1):  # the first round is for warming up
        for session, times in zip(sessions, seconds_of_session, strict=True):
            began = time.perf_counter()
            session.run(None, {_NAME: x})
            times.append(time.perf_counter() - began)
    return [median(times[1:]) for times in seconds_of_session]


def run_recorded(
    model: nn.Module, layers: dict[str, QuantizedLayer], x: Tensor
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Runs the model with these integer layers; returns its output, and the input and output of each layer."""
    calls: dict[str, tuple[Array, Array]] = {}

    def listener(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] = args[0].numpy().copy(), output.numpy().copy()

        return record

    with torch.no_grad(), quantized(model, layers):
        handles = [model.get_submodule(name).register_forward_hook(listener(name)) for name in layers]
        model_output = model(x)
        for handle in handles:
            handle.remove()
    return (model_output if isinstance(model_output, Tensor) else model_output.logits).numpy(), calls


def differing(proto: onnx.ModelProto, calls: dict[str, tuple[Array, Array]]) -> int:
    """Counts the layers of Ascend's graph whose output differs by a bit from torch's for the same input."""
    part, inputs = (
        onnx.ModelProto(),
        dict[str, str](),
    )  # inputs: tensor between AscendQuant, AscendDequant -> layer input
    part.CopyFrom(proto)
    del part.graph.node[:], part.graph.input[:], part.graph.output[:]
    feeds, kind = dict[str, Array](), onnx.TensorProto.FLOAT
    for node in proto.graph.node:
        if node.op_type == QUANT:
            inputs[node.output[0]] = node.input[0]
        elif origins := [name for name in node.input if name in inputs]:
            inputs[node.output[0]] = inputs[origins[0]]
        else:
            continue
        part.graph.node.append(node)
        if node.op_type == DEQUANT:
            feeds[inputs.pop(node.output[0])] = calls[node.output[0]][0]
            part.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    part.graph.input.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in feeds)
    names = [value.name for value in part.graph.output]
    outputs = zip(names, AscendGraph(part)(**feeds), strict=True)
    return sum(not np.array_equal(output, calls[name][1]) for name, output in outputs)


def row(name: str, rounds: int) -> list[str]:
    """Measures one network; returns the cells of its row."""
    model, x = subject(name)
    result, model = calibrate_folded(model, lambda: [Sample((x,), {})])
    began = time.perf_counter()
    traced = trace(model, result.layers, result.example)
    tracing = time.perf_counter() - began
    graphs = [qdq(traced, result.layers), float_graph(trace(model, {}, result.example))]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.onnx" for number in range(2)]
        sessions = [session(graph, file) for graph, file in zip(graphs, files, strict=True)]
        kinds = Counter(node.op_type for node in onnx.load(files[0]).graph.node)
    integer, exact = seconds(sessions, x.numpy(), rounds)
    wanted, calls = run_recorded(model, result.layers, x)
    graph = ascend(traced, result.layers)
    device = AscendGraph(graph)(**{_NAME: x.numpy()})[0]
    others = sessions[0].run(None, {_NAME: x.numpy()})[0], device, run_recorded(model, {}, x)[0]
    off = [f"{float(np.abs(other - wanted).max()) / float(np.ptp(wanted)) * 255:.2f}" for other in others]
    unequal = f"{differing(graph, calls)} of {len(calls)}"
    sizes = [f"{graph.ByteSize() / 2**20:.1f}" for graph in graphs]
    fused = f"{sum(kinds[kind] for kind in _INT8)} of {len(result.layers)}"
    times = [f"{exact * 1e3:.1f}", f"{integer * 1e3:.1f}", f"{exact / integer:.2f} x"]
    return [name, *times, fused, *reversed(sizes), *off, unequal, f"{tracing:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="*", default=["digits", "18", "50", *_TRANSFORMERS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "network", "float ms", "int8 ms", "faster", "fused", "float MiB", "int8 MiB",
        "onnxruntime off by", "Ascend's graph off by", "int8 off float", "layers unequal", "traced in s",
    )  # fmt: skip
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for name in options.networks:
        print("|", " | ".join(row(name, options.rounds)), "|", flush=True)


if __name__ == "__main__":
    main()
