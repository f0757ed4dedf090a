"""Graphs of whole networks compute what the integer layers compute, in onnxruntime and as Ascend's compiler does.

Both of torch's exporters trace the networks.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.ascend.write import write_ascend
from octavo.calibrate.formats.onnx.ascend_graph import ascend
from octavo.calibrate.formats.onnx.check import layers_of
from octavo.calibrate.formats.onnx.graph_builder import float_graph
from octavo.calibrate.formats.onnx.qdq_graph import qdq
from octavo.calibrate.formats.onnx.read import Graph
from octavo.calibrate.formats.onnx.trace import EXPORTERS, trace
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.replay.user_data import Sample
from octavo.capture.files import Modes

from ....helpers.refusals import refused
from ....zoo.convolutions import with_statistics
from ....zoo.graphs import (
    NAME,
    Mixed,
    both,
    integers,
    mixed_layers,
    older,
    on_ascend,
    on_runtime,
    pictures,
    step,
    stored,
)
from ....zoo.layer_kinds import frozen


@pytest.fixture(scope="module")
def mixed():
    """A network, its integer layers, and the graph that each exporter traces."""
    model = Mixed()
    layers = mixed_layers(model)
    call = Sample((pictures(1)[0][:1],), {})
    return model, layers, [trace(model, layers, call, exporters=[exporter]) for exporter in EXPORTERS]


def test_both_exporters_give_what_the_integers_give_for_any_batch(mixed):
    model, layers, traced = mixed
    for count in (1, 5):
        x = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))
        exact = integers(model, layers, x)
        for graph in traced:
            assert graph.graph.input[0].name == NAME
            runtime, device = both(graph, layers, x)
            assert np.abs(runtime - exact).max() <= step(exact)
            assert np.abs(device - exact).max() <= step(exact)


def test_ascends_graph_makes_the_same_numbers_bit_for_bit(mixed):
    model, layers, traced = mixed
    x = pictures(1, seed=8)[0]
    assert np.array_equal(on_ascend(ascend(traced[0], layers), x), integers(model, layers, x))


def test_values_halfway_between_two_codes_round_the_same_way():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).eval()
    layers = {"0": frozen(model[0], "W8A8")}
    x = (torch.arange(-100, 100).view(-1, 4) + 0.5) * layers["0"].input_scale
    graph = ascend(older(model, layers, x), layers)
    exact = integers(model, layers, x)
    assert np.array_equal(on_ascend(graph, x), exact)
    scale = next(attribute for node in graph.graph.node for attribute in node.attribute if attribute.name == "scale")
    scale.f = float(np.nextafter(np.float32(scale.f), np.float32(0)))
    assert not np.array_equal(on_ascend(graph, x), exact)


def test_every_integer_is_that_of_the_layers_and_of_the_safetensors(mixed, tmp_path):
    model, layers, traced = mixed
    write_ascend(layers, model, tmp_path, Modes())
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    for proto in (qdq(traced[0], layers), ascend(traced[0], layers)):
        arrays = stored(proto)
        for name in layers:
            weight = tensors[f"{name}.weight"].numpy()
            assert np.array_equal(arrays.get(f"{name}.weight", weight), weight)
            assert np.array_equal(arrays.get(f"{name}.weight.T", weight.T), weight.T)
            assert {f"{name}.weight", f"{name}.weight.T"} & set(arrays)
            sums = weight.reshape(len(weight), -1).sum(1, dtype=np.int64)
            bias = arrays.get(f"{name}.bias", arrays.get(f"{name}.bias.added", np.zeros(len(weight), np.int64)))
            offset = int(tensors[f"{name}.input_offset"])
            assert np.array_equal(bias - offset * sums, tensors[f"{name}.quant_bias"].numpy())
        if f"{name}.deq_scale" in arrays:
            for name in layers:
                assert np.array_equal(arrays[f"{name}.deq_scale"], tensors[f"{name}.deq_scale"].numpy())
                assert arrays[f"{name}.deq_scale"].dtype == np.uint64


def test_a_layer_used_twice_is_stored_once_for_each_form(mixed):
    _, layers, traced = mixed
    arrays = stored(ascend(traced[0], layers))
    assert sum(name.startswith("twice.weight") for name in arrays) == 1
    assert sorted(name for name in arrays if name.startswith("again.weight")) == ["again.weight", "again.weight.T"]
    used = [
        node.input[1] for node in ascend(traced[0], layers).graph.node if node.op_type in ("Conv", "MatMul", "Gemm")
    ]
    assert used.count("twice.weight") == 2
    assert used.count("bare.weight.T") == 2  # `bare` is one module with two names


def test_what_has_no_integer_form_stays_float_and_is_listed(mixed):
    _, layers, traced = mixed
    for proto in (qdq(traced[0], layers), ascend(traced[0], layers)):
        rows = layers_of(Graph(Path("g.onnx"), proto, "", 0, 0))
        assert [layer.name for layer in rows if layer.scheme == "float"] == ["up"]
        assert {layer.name for layer in rows if layer.scheme == "W8A8"} == set(layers)
        assert stored(proto)["up.weight"].dtype == np.float32


def test_graphs_hold_no_trace_of_machine_or_time_and_are_reproducible(mixed):
    model, layers, traced = mixed
    again = trace(model, layers, Sample((pictures(1)[0][:1],), {}))
    for make in (qdq, ascend):
        data = make(traced[0], layers).SerializeToString(deterministic=True)
        assert data == make(again, layers).SerializeToString(deterministic=True)
        for word in (str(Path.cwd()), "pytorch", ".py", "Traceback", "octavo::Layer", "Mixed"):
            assert word.encode() not in data
        assert {opset.domain for opset in make(traced[0], layers).opset_import} == {""}
        assert make(traced[0], layers).opset_import[0].version >= 17


def test_tracing_leaves_the_model_unchanged(mixed):
    model = Mixed().train()
    before = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    modes = [module.training for module in model.modules()]
    layers = {"bare": frozen(model.bare, "W8A8")}
    older(model, layers, pictures(1)[0])
    assert {name: module for name, module in model.named_modules(remove_duplicate=False)} == before
    assert [module.training for module in model.modules()] == modes


def test_names_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale=None):
            return self.linear(x) * scale

    model = Two().eval()
    layers = {"linear": frozen(model.linear, "W8A8")}
    call = Sample((torch.randn(2, 4),), {"scale": torch.randn(2, 1)})
    for exporter in EXPORTERS:
        traced = trace(model, layers, call, ["pixels", "factor"], exporters=[exporter])
        assert [value.name for value in traced.graph.input] == ["pixels", "factor"]
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in traced.graph.input)
    for names in (["pixels"], ["a", "a"], ["a", "b", "c"]):
        refused(partial(trace, model, layers, call, names), 2, re.compile(r"^input_names: .* the model's 2 inputs"))


def test_a_layer_that_the_call_does_not_reach_is_named():
    model = Mixed()
    model.never = nn.Linear(3, 3)
    layers = {name: frozen(model.get_submodule(name), "W8A8") for name in ("bare", "never")}
    refused(lambda: older(model, layers, pictures(1)[0]), 4, re.compile(r"^never: is not in the traced graph"))


def test_a_model_may_look_at_the_sizes_of_its_layers():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, (3, 2), (2, 1), groups=3)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            around = (self.conv.kernel_size[1] - 1, 0, self.conv.stride[0], self.conv.dilation[0])
            y = self.conv(nn.functional.pad(x, around)).unflatten(1, (self.conv.groups, -1))
            return self.head(y.mean((3, 4)).flatten(1)[:, : self.head.in_features]).view(-1, self.head.out_features)

    model = Padding().eval()
    layers = {name: frozen(model.get_submodule(name), "W8A8") for name in ("conv", "head")}
    x = torch.randn(2, 3, 5, 6)
    for exporter in EXPORTERS:
        traced = trace(model, layers, Sample((x,), {}), exporters=[exporter])
        assert np.allclose(on_ascend(ascend(traced, layers), x), integers(model, layers, x), atol=1e-5)


def test_a_model_that_no_exporter_takes():
    class Foreign(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.linalg.pinv(x.numpy()))

    message = refused(
        lambda: trace(Foreign(), {}, Sample((torch.randn(3, 3),), {})),
        4,
        re.compile(r"^Foreign: torch\.onnx cannot export this model"),
    )
    assert message.isprintable()
    assert "Next steps" not in message


def test_transformers_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=5)
    model = with_statistics(ResNetForImageClassification(config))
    data = [Sample((x,), {}) for x in pictures(4, size=32)]
    result, folded = calibrate_folded(model, lambda: data)
    assert len(result.layers) == 9
    traced = trace(folded, result.layers, result.example)
    assert not any(node.op_type == "BatchNormalization" for node in traced.graph.node)
    x = pictures(1, seed=9, size=32)[0]
    with torch.no_grad(), quantized(folded, result.layers):
        exact = folded(x).logits.numpy()
    for output in both(traced, result.layers, x):
        assert np.abs(output - exact).max() <= step(exact)
    with torch.no_grad():
        unquantized = float_graph(older(folded, {}, x))
        assert np.allclose(on_runtime(unquantized, x), model(x).logits.numpy(), atol=1e-4)


def test_the_evaluator_refuses_what_the_compiler_would_not_take(mixed):
    _, layers, traced = mixed
    proto = ascend(traced[1], layers)
    codes = next(node.output[0] for node in proto.graph.node if node.op_type == "AscendQuant")
    proto.graph.node.append(onnx.helper.make_node("Relu", [codes], ["other"], name="other"))
    refused(lambda: on_ascend(proto, pictures(1)[0]), 3, re.compile(r"^other: .* refuses a Relu that reads the codes"))
