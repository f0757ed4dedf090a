"""Integer layers compute exactly, for every shape, and come and go without a trace."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.layers import products as integers
from octavo.calibrate.layers.inputs import FloatInput, StaticInput
from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.layers.modules import QuantizedConv2d, QuantizedLinear, build
from octavo.calibrate.layers.products import integer_matmul
from octavo.calibrate.layers.scheme import ACTIVATION, Range, codes, qparams_of

from ...helpers.examples import examples
from ...zoo.convolutions import CHANNELS, geometries
from ...zoo.layer_kinds import frozen
from ...zoo.toy import Block, calls, nearest, toy


def integer(module: nn.Module, low: float = -2.0, high: float = 3.0):
    qparams = qparams_of(Range(low, high), ACTIVATION, module.weight.dtype)
    return build(nearest(module.weight, module.bias, StaticInput(qparams)), module)


@pytest.mark.parametrize("matmul", [integer_matmul, integers._in_float])
@examples(150)
@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_products_are_summed_exactly(matmul, k, rows, outs, seed, extreme):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (rows, k), generator=generator)
    w = torch.randint(-127, 128, (outs, k), generator=generator)
    if extreme:  # all products alike: the largest sums there are
        q, w = torch.full_like(q, -128), torch.full_like(w, 127)
    assert torch.equal(matmul(q.float(), w.to(torch.int8)).long(), q @ w.T)


def test_one_piece_would_not_do():
    q, w = torch.full((1, 5000), -127.0), torch.full((1, 5000), 127.0)
    q[0, ::2] = -126.0
    wanted = int(q.long() @ w.long().T)
    assert int(integers._in_float(q, w.to(torch.int8))) == wanted
    in_order = torch.zeros(())
    for value in (q * w)[0]:
        in_order += value  # float32, past 2**24
    assert int(in_order) != wanted


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_inputs_of_any_rank(rank):
    layer = integer(nn.Linear(6, 4))
    x = torch.randn(*range(2, rank + 1), 6)
    y = layer(input=x)
    assert y.shape == (*x.shape[:-1], 4)
    assert torch.equal(y.reshape(-1, 4), layer(x.reshape(-1, 6)))


def test_no_rows_give_no_rows():
    assert integer(nn.Linear(6, 4))(torch.zeros(0, 6)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input_and_is_near_the_float_one(dtype):
    torch.manual_seed(0)
    module = nn.Linear(64, 32).to(dtype)
    x = torch.randn(9, 64, dtype=dtype).clamp(-2, 3)
    y = integer(module)(x)
    assert y.dtype == dtype
    assert (y.float() - module(x).float()).norm() < 0.02 * module(x).float().norm()


@settings(max_examples=100, deadline=None)
@given(geometries(), st.sampled_from([-2.0, 0.0]), st.integers(0, 2**31))
def test_a_convolution_is_exact_to_its_borders(options, low, seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(CHANNELS, CHANNELS, **options)
    layer = integer(module, low)
    assert isinstance(layer, QuantizedConv2d)
    x = torch.rand(2, CHANNELS, 9, 10) * (3 - low) + low
    q = codes(x, qparams_of(Range(low, 3.0), ACTIVATION, torch.float32), ACTIVATION)
    # what zero padding means: zeros after the zero point is taken away
    exact = nn.Conv2d(CHANNELS, CHANNELS, **{**options, "bias": False}).double()
    exact.weight.data = layer.weight.double()
    total = exact(q.double() - int(layer.input_zero_point))
    bias = torch.zeros(CHANNELS) if module.bias is None else module.bias
    wanted = total * layer.deq.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    error = (layer(x).double() - wanted).abs()
    assert bool((error <= 0.51 * layer.deq.double().view(-1, 1, 1) + 1e-6 * wanted.abs()).all())
    assert (layer(x) - module(x)).norm() < 0.03 * module(x).norm()


@settings(max_examples=50, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_the_offset_of_a_convolution_is_summed_over_all_of_a_kernel(options, seed):
    torch.manual_seed(seed)
    layer = integer(nn.Conv2d(CHANNELS, CHANNELS, **{**options, "bias": False}), 0.0)
    sums = [int(kernel.long().sum()) for kernel in layer.weight]  # each over (in / groups, height, width)
    assert layer.quant_bias.tolist() == [128 * each for each in sums]
    assert layer.deq.shape == layer.quant_bias.shape == (CHANNELS,)


@settings(max_examples=30, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_a_kernel_of_zeros_gives_the_bias_and_channels_permute(options, seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(CHANNELS, CHANNELS, **options).requires_grad_(False)
    module.weight[2] = 0
    x = torch.randn(1, CHANNELS, 9, 9).clamp(-2, 3)
    y = integer(module)(x)
    assert bool((y[:, 2] == (0.0 if module.bias is None else module.bias[2])).all())
    # outputs of one group trade places
    order = torch.arange(CHANNELS).view(module.groups, -1).flip(1).flatten()
    other = nn.Conv2d(CHANNELS, CHANNELS, **options).requires_grad_(False)
    other.weight.copy_(module.weight[order])
    if module.bias is not None:
        other.bias.copy_(module.bias[order])
    assert torch.equal(integer(other)(x), y[:, order])


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC", "W8A16"])
def test_groups_compute_as_convolutions_of_their_own(kind):
    torch.manual_seed(0)
    whole = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    x = torch.randn(2, 6, 5, 5)
    x[:, :, 0, 0] = 1.5  # the largest of each half, which a dynamic scale follows
    x = x.clamp(-1.5, 1.5)
    parts = []
    for at in range(2):
        part = nn.Conv2d(3, 2, 3, padding=1)
        part.weight.data, part.bias.data = whole.weight[2 * at : 2 * at + 2].data, whole.bias[2 * at : 2 * at + 2].data
        parts.append(frozen(part, kind)(x[:, 3 * at : 3 * at + 3]))
    assert torch.allclose(frozen(whole, kind)(x), torch.cat(parts, 1), atol=1e-6)


def test_padding_with_the_code_zero_would_be_wrong_at_the_borders():
    torch.manual_seed(1)
    module = nn.Conv2d(2, 2, 3, padding=1)
    layer = integer(module, 0.0)
    x = torch.rand(1, 2, 5, 5)
    zero_point = float(layer.input_zero_point)
    assert zero_point == -128
    naive = F.conv2d(codes(x, layer.numbers.input.qparams, ACTIVATION), layer.weight.float(), None, padding=1)
    naive = (naive + layer.quant_bias.view(-1, 1, 1)) * layer.deq.view(-1, 1, 1)
    difference = (naive - layer(x)).abs()[0, 0]
    assert difference[0].max() > 0.1
    assert difference[1:-1, 1:-1].max() < 1e-5


def test_an_image_without_batch():
    layer = integer(nn.Conv2d(2, 3, 3, padding=1))
    x = torch.randn(2, 5, 5)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_weight_only_layers_compute_with_the_rounded_weight():
    for module, x in ((nn.Linear(6, 4), torch.randn(3, 6)), (nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 4, 4))):
        layer = build(nearest(module.weight, module.bias, FloatInput()), module)
        assert layer.weight_only
        assert (layer(x) - module(x)).norm() < 0.02 * module(x).norm()


def test_other_code_finds_what_it_looks_for_on_a_layer():
    layer = integer(nn.Linear(6, 4))
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (6, 4, torch.int8)
    assert next(layer.parameters()).dtype == torch.int8
    assert "in_features=6" in repr(layer)


def test_a_model_has_its_layers_back_whatever_happens():
    model = toy()
    before = dict(model.named_modules())
    layers = {"blocks.0.up": integer(model.blocks[0].up), "proj_out": integer(model.proj_out)}
    exact = model(*calls(1)[0].args)
    with quantized(model, layers):
        assert model.proj_out is layers["proj_out"]
        assert not torch.equal(model(*calls(1)[0].args), exact)
    assert dict(model.named_modules()) == before
    with pytest.raises(RuntimeError, match=r"shape|size"), quantized(model, layers):
        model.proj_out(torch.zeros(3, 5))
    assert dict(model.named_modules()) == before
    assert torch.equal(model(*calls(1)[0].args), exact)


def test_a_shared_layer_is_replaced_at_all_its_names():
    model = nn.ModuleDict({"a": Block(4), "b": Block(4)})
    model["b"].up = model["a"].up
    layer = integer(model["a"].up)
    with quantized(model, {"a.up": layer}):
        assert model["a"].up is model["b"].up is layer
    install(model, {"a.up": layer})
    assert model["a"].up is model["b"].up is layer
    assert isinstance(layer, QuantizedLinear)
