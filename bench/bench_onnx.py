"""onnxruntime: the QDQ graph against the float one, and how far it is from the integers that were evaluated.

    python -m bench.bench_onnx [--rounds 9] [--networks digits 18 50]

One thread; runs of both graphs alternate; medians. `fused` are the layers that onnxruntime computes in int8: it wants
the output quantized too, so a layer whose output goes into a residual sum is dequantized and computed in float.
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

from bench.bench_cnn import bundled
from bench.resnet import resnet18, resnet50
from calibrate.data import Sample
from calibrate.fold import calibrate_folded
from calibrate.layers import quantized
from calibrate.onnx.ascend import ascend
from calibrate.onnx.device import AscendGraph
from calibrate.onnx.graph import floating
from calibrate.onnx.qdq import qdq
from calibrate.onnx.trace import trace

_NAME = "input.1"
_INT8 = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def session(proto: onnx.ModelProto, optimized: Path) -> onnxruntime.InferenceSession:
    """One of one thread; the graph as it was optimized goes to `optimized`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def subject(name: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch of inputs."""
    if name == "digits":
        data = bundled()
        return data.model, data.training[:16]
    torch.manual_seed(0)
    model = {"18": resnet18, "50": resnet50}[name]().eval().requires_grad_(False)
    return model, torch.randn(1, 3, 224, 224)


def seconds(sessions: list[onnxruntime.InferenceSession], x: np.ndarray[Any, Any], rounds: int) -> list[float]:
    """The median of each, in turns."""
    taken: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds + 1):  # the first is to warm up
        for each, times in zip(sessions, taken, strict=True):
            began = time.perf_counter()
            each.run(None, {_NAME: x})
            times.append(time.perf_counter() - began)
    return [median(times[1:]) for times in taken]


def row(name: str, rounds: int) -> list[str]:
    """What is measured of one network."""
    model, x = subject(name)
    result, model = calibrate_folded(model, lambda: [Sample((x,), {})])
    began = time.perf_counter()
    traced = trace(model, result.layers, result.example)
    tracing = time.perf_counter() - began
    graphs = [qdq(traced, result.layers), floating(trace(model, {}, result.example))]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{at}.onnx" for at in range(2)]
        sessions = [session(graph, file) for graph, file in zip(graphs, files, strict=True)]
        kinds = Counter(node.op_type for node in onnx.load(files[0]).graph.node)
    integer, exact = seconds(sessions, x.numpy(), rounds)
    with torch.no_grad(), quantized(model, result.layers):
        made = model(x)
    wanted = (made if isinstance(made, Tensor) else made.logits).numpy()
    step = float(np.ptp(wanted)) / 255
    runtime = sessions[0].run(None, {_NAME: x.numpy()})[0]
    device = AscendGraph(ascend(traced, result.layers))(**{_NAME: x.numpy()})[0]
    off = [f"{float(np.abs(found - wanted).max()) / step:.2f}" for found in (runtime, device)]
    sizes = [f"{graph.ByteSize() / 2**20:.1f}" for graph in graphs]
    fused = f"{sum(kinds[kind] for kind in _INT8)} of {len(result.layers)}"
    times = [f"{exact * 1e3:.1f}", f"{integer * 1e3:.1f}", f"{exact / integer:.2f} x"]
    return [name, *times, fused, *reversed(sizes), *off, f"{tracing:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="*", default=["digits", "18", "50"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "network", "float ms", "int8 ms", "faster", "fused", "float MiB", "int8 MiB",
        "onnxruntime off by steps", "Ascend's graph", "traced in s",
    )  # fmt: skip
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for name in options.networks:
        print("|", " | ".join(row(name, options.rounds)), "|", flush=True)


if __name__ == "__main__":
    main()
