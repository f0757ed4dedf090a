"""One layer as a graph: both graphs compute what the integer layer computes."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from octavo.calibrate.formats.onnx.ascend_graph import ascend
from octavo.calibrate.formats.onnx.graph_builder import float_graph
from octavo.calibrate.formats.onnx.qdq_graph import qdq

from ....helpers.refusals import refused
from ....zoo.convolutions import CHANNELS, geometries
from ....zoo.graphs import both, integers, older, on_ascend, on_runtime, step, stored
from ....zoo.layer_kinds import frozen


def on_grid(layer, *shape):
    """Inputs that are codes exactly, so that no way to divide makes another one of them; some are clamped."""
    codes = torch.randint(-150, 150, shape, generator=torch.Generator().manual_seed(1))
    return (codes - layer.input_zero_point) * layer.input_scale


@settings(max_examples=40, deadline=None)
@given(geometries())
def test_a_convolution_of_any_geometry(options):
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, **options)).eval()
    layers = {"0": frozen(model[0], "W8A8")}
    x = on_grid(layers["0"], 2, CHANNELS, 9, 10)
    exact = integers(model, layers, x)
    runtime, device = both(older(model, layers, x), layers, x)
    assert np.abs(runtime - exact).max() <= 1e-3 * step(exact)
    assert np.array_equal(device, exact)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_of_any_rank(shape, bias):
    model = nn.Sequential(nn.Linear(8, 6, bias)).eval()
    layers = {"0": frozen(model[0], "W8A8")}
    x = on_grid(layers["0"], *shape)
    exact = integers(model, layers, x)
    traced = older(model, layers, x)
    runtime, device = both(traced, layers, x)
    assert np.abs(runtime - exact).max() <= 1e-3 * step(exact)
    assert np.array_equal(device, exact)
    operators = [node.op_type for node in ascend(traced, layers).graph.node]
    assert operators[1] == ("Gemm" if len(shape) == 2 else "MatMul")
    assert ("Add" in operators) == (bias and len(shape) != 2)


def test_a_picture_without_a_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    layers = {"0": frozen(model[0], "W8A8")}
    x = on_grid(layers["0"], 3, 6, 6)
    for found in both(older(model, layers, x), layers, x):
        assert np.allclose(found, integers(model, layers, x), atol=1e-6)


def test_zeros_around_a_picture_are_the_zero_point():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=2)).eval()
    layer = frozen(model[0], "W8A8")
    layer.input_zero_point += 40  # 0.0 is far from code 0
    layers = {"0": layer}
    x = torch.zeros(1, 2, 5, 5)
    exact = integers(model, layers, x)
    assert np.ptp(exact[0, 0]) == 0  # nothing tells padding from what is inside
    wrong = nn.functional.conv2d(torch.full((1, 2, 5, 5), 40.0), layer.weight.float(), padding=2)
    assert np.ptp(wrong[0, 0].numpy()) > 100  # as codes padded with 0 would
    for found in both(older(model, layers, x), layers, x):
        assert np.allclose(found, exact, atol=1e-6)
        assert np.ptp(found[0, 0]) < 1e-6


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, bias=False), nn.Linear(4, 6)])
def test_smoothing_and_corrections_are_carried(module):
    model = nn.Sequential(module).eval()
    options = {"multiplier": torch.rand(4) + 0.3, "correction": torch.randn(6)}
    layers = {"0": frozen(module, "W8A8", **options)}
    shape = (2, 4, 5, 5) if module.weight.ndim == 4 else (3, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    exact = integers(model, layers, x)
    without = integers(model, {"0": frozen(module, "W8A8")}, x)
    assert np.abs(exact - without).max() > 10 * step(exact)
    for found in both(older(model, layers, x), layers, x):
        assert np.abs(found - exact).max() <= step(exact)


def test_a_bias_is_fused_or_added_with_the_same_numbers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    layers = {name: frozen(model[int(name)], "W8A8") for name in "02"}
    x = torch.randn(2, 3, 4, 4)
    traced = older(model, layers, x)
    fused, added = (ascend(traced, layers, fuse_add=fuse) for fuse in (True, False))
    assert [sum(node.op_type == "Add" for node in graph.graph.node) for graph in (fused, added)] == [0, 2]
    assert np.array_equal(on_ascend(fused, x), on_ascend(added, x))


def test_channels_of_zeros_put_out_their_bias():
    linear = nn.Linear(4, 5)
    with torch.no_grad():
        linear.weight[1:3] = 0
        linear.bias[2], linear.bias[1] = 0.0, 1e-4
    model = nn.Sequential(linear).eval()
    layers = {"0": frozen(linear, "W8A8")}
    x = torch.randn(3, 4)
    for found in both(older(model, layers, x), layers, x):
        assert np.allclose(found[:, 1], 1e-4, rtol=1e-6)
        assert not found[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_halves_is_cast_around_its_integers(dtype):
    model = nn.Sequential(nn.Linear(8, 6)).eval().to(dtype)
    layers = {"0": frozen(model[0], "W8A8")}
    graph = qdq(older(model, layers, torch.randn(3, 8, dtype=dtype)), layers)
    assert [node.op_type for node in graph.graph.node].count("Cast") == 2
    if dtype == torch.float16:
        x = torch.randn(3, 8).half()
        exact = integers(model, layers, x)
        assert np.abs(on_runtime(graph, x).astype(float) - exact).max() <= step(exact)


def test_weights_alone_are_dequantized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(16, 5)).eval()
    layers = {name: frozen(model[int(name)], "W8A16") for name in "02"}
    x = torch.randn(2, 3, 4, 4)
    graph = qdq(older(model, layers, x), layers)
    assert not any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    assert stored(graph)["0.weight"].dtype == np.int8
    assert np.allclose(on_runtime(graph, x), integers(model, layers, x), atol=1e-5)


@pytest.mark.parametrize("make", [qdq, ascend])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8_TIMESTEP", "W8A16"])
def test_schemes_that_a_graph_has_no_form_for_are_refused(make, kind):
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    layers = {"0": frozen(model[0], kind)}
    if (make, kind) == (qdq, "W8A16"):
        return
    refused(
        lambda: make(float_graph(older(model, {}, torch.randn(3, 8))), layers),
        2,
        re.compile(f"^0: format .*onnx cannot hold {kind} layers, "),
    )
