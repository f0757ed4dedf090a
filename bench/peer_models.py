"""Makes the models that bench.peers compares, from the stored models; each is a function that runs one call."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.calibrate.layers.modules import QuantizedLinear

from .bench_runtime import call_of
from .peer_graphs import dynamic_graph, inputs_of, static_graph

Model = Callable[[], Tensor]


class Stored(StrEnum):
    """The names of the files that bench.peers stores: the float model, the int8 model, the float outputs."""

    FLOAT = "float.pt"
    INT8 = "int8.pt"
    OUTPUTS = "outputs.pt"


def _load(folder: Path, name: Stored) -> nn.Module:
    model: nn.Module = torch.load(folder / name, weights_only=False, mmap=True)
    return model


def _names(folder: Path) -> set[str]:
    model = _load(folder, Stored.INT8)
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _calling(model: nn.Module, tokens: int, dtype: torch.dtype) -> Model:
    kwargs = call_of(tokens, dtype).kwargs
    return lambda: model(**kwargs)[0]


def _float32(folder: Path, tokens: int) -> Model:
    return _calling(_load(folder, Stored.FLOAT), tokens, torch.float32)


def _bfloat16(folder: Path, tokens: int) -> Model:
    return _calling(_load(folder, Stored.FLOAT).to(torch.bfloat16), tokens, torch.bfloat16)


def _octavo(folder: Path, tokens: int) -> Model:
    return _calling(_load(folder, Stored.INT8), tokens, torch.bfloat16)


def _octavo_compiled(folder: Path, tokens: int) -> Model:
    return _calling(torch.compile(_load(folder, Stored.INT8)), tokens, torch.bfloat16)


def _torchao(folder: Path, tokens: int) -> Model:
    return _calling(_with_torchao(folder), tokens, torch.bfloat16)


def _torchao_compiled(folder: Path, tokens: int) -> Model:
    return _calling(torch.compile(_with_torchao(folder)), tokens, torch.bfloat16)


def _with_torchao(folder: Path) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    names, model = _names(folder), _load(folder, Stored.FLOAT).to(torch.bfloat16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in names)
    return model


def _quanto(folder: Path, tokens: int) -> Model:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = _load(folder, Stored.FLOAT).to(torch.bfloat16)
    quantize(model, weights=qint8, activations=qint8, include=sorted(_names(folder)))
    with Calibration():
        model(**call_of(256, torch.bfloat16, text=77).kwargs)
    freeze(model)
    return _calling(model, tokens, torch.bfloat16)


def _onnxruntime_dynamic(folder: Path, tokens: int) -> Model:
    return _onnxruntime(dynamic_graph(folder, _load(folder, Stored.FLOAT), tokens, _names(folder)), tokens)


def _onnxruntime_static(folder: Path, tokens: int) -> Model:
    return _onnxruntime(_static(folder, tokens), tokens)


def _static(folder: Path, tokens: int) -> Path:
    return static_graph(folder, _load(folder, Stored.FLOAT), _load(folder, Stored.INT8), tokens)


def _onnxruntime(file: Path, tokens: int) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other models compute between the calls
    # MatMulAddFusion makes a float Gemm of a product, which onnxruntime then does not compute in integers
    provider, disabled = ["CPUExecutionProvider"], ["MatMulAddFusion"]
    session = onnxruntime.InferenceSession(str(file), options, provider, disabled_optimizers=disabled)
    feed = {name: tensor.numpy() for name, tensor in inputs_of(tokens).items()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(folder: Path, tokens: int, **more: str) -> Model:
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **more}
    compiled = openvino.Core().compile_model(str(_static(folder, tokens)), "CPU", options)
    feed = {name: tensor.numpy() for name, tensor in inputs_of(tokens).items()}
    return lambda: torch.from_numpy(compiled(feed)[0])


PEERS: dict[str, Callable[[Path, int], Model]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "torchao int8 dynamic": _torchao,
    "torchao int8 dynamic, torch.compile": _torchao_compiled,
    "optimum-quanto int8": _quanto,
    "onnxruntime int8, quantize_dynamic": _onnxruntime_dynamic,
    "onnxruntime int8, static QDQ": _onnxruntime_static,
    "openvino int8, static QDQ": _openvino,
    "openvino int8, static QDQ, float32 around it": partial(_openvino, INFERENCE_PRECISION_HINT="f32"),
    "Octavo int8, torch.compile": _octavo_compiled,
    "Octavo int8": _octavo,
}
