"""Layers with FP8 and MXFP8 codes compute the product of the values that their codes stand for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import INPUTS, RULES
from octavo.calibrate.layers.modules import build
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import FP8, MXFP8, block_scales, in_float32
from octavo.calibrate.layers.schemes import FP8_SCHEMES
from octavo.calibrate.layers.weights import decoded, encoded, round_to_nearest, scales_of, spread
from octavo.calibrate.runtime.accelerate import optimized

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
some = settings(max_examples=40, deadline=None)
floats = st.floats(width=32, allow_nan=False)


def layer_of(module, scheme, per_tensor=False, clamping=False):
    """Returns the layer of this scheme. Two timestep bins have the input scales 0.01 and 0.02; the second one
    counts."""
    rule = replace(RULES[scheme], per_tensor=per_tensor, clamping=clamping)
    scale = torch.tensor([0.01, 0.02]) if INPUTS[scheme].by_level else torch.tensor(0.02)
    tensors = {
        "input_scale": scale, "input_zero_point": torch.zeros_like(scale, dtype=torch.int32),
        "edges": torch.tensor([300.0]),
    }  # fmt: skip
    input = INPUTS[scheme].of(tensors, rule)
    quantized = round_to_nearest(module.weight, scheme=input.weights)
    layer = build(numbers_of(quantized, module.bias, input, module.weight.dtype), module)
    layer.noise_level = NoiseLevel.of(torch.tensor(500.0))
    return layer


def rounded(x):
    """Returns `x` as torch's own cast rounds it, in float64."""
    return x.to(torch.float32).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float64)


def values_of(x, scheme, axes, clamping=False):
    """Returns the values that the codes of an input stand for, in float64."""
    if not INPUTS[scheme].rounded:
        return x.double()
    if INPUTS[scheme].ranged:
        return rounded(x / 0.02) * torch.tensor(0.02).double()
    if RULES[scheme].block:
        largest = x.unflatten(-1, (-1, 32)).abs().amax(-1)
        scale = block_scales(largest, clamping).repeat_interleave(32, -1)
    else:
        scale = x.abs().amax(axes, keepdim=True) / 448
    return rounded(x / scale) * scale.double()


@pytest.mark.parametrize("clamping", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scheme", FP8_SCHEMES)
def test_a_linear_layer_is_the_product_of_its_values(scheme, per_tensor, clamping):
    torch.manual_seed(0)
    module, x = nn.Linear(96, 24), torch.randn(3, 5, 96) * torch.logspace(-3, 0.5, 96)
    layer = layer_of(module, scheme, per_tensor and not RULES[scheme].block, clamping and bool(RULES[scheme].block))
    weight = in_float32(layer.weight.detach()).double() * spread(decoded(layer.weight_scale), layer.weight).double()
    wanted = F.linear(values_of(x, scheme, (-1,), layer.input_scheme.clamping), weight, module.bias.double())
    allowed = 1e-6 * F.linear(x.double().abs(), weight.abs()) + 1e-6
    assert bool(((layer(x).double() - wanted).abs() <= allowed).all())
    assert bool(((optimized(layer)(x).double() - wanted).abs() <= allowed).all())
    if per_tensor and not RULES[scheme].block:
        assert len(layer.weight_scale.unique()) == 1


@pytest.mark.parametrize("scheme", [name for name in FP8_SCHEMES if not RULES[name].block])
def test_a_convolution_is_that_of_its_values(scheme):
    torch.manual_seed(0)
    module, x = nn.Conv2d(8, 12, 3, padding=1, groups=2), torch.randn(2, 8, 7, 6)
    layer = layer_of(module, scheme)
    weight = in_float32(layer.weight.detach()).double() * layer.weight_scale.view(-1, 1, 1, 1).double()
    wanted = F.conv2d(values_of(x, scheme, (-3, -2, -1)), weight, module.bias.double(), 1, 1, 1, 2)
    for y in (layer(x), optimized(layer)(x)):
        assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)


@given(values=st.lists(floats, min_size=1, max_size=50))
@some
def test_rounding_is_torch_s_cast(values):
    x = torch.tensor(values)
    assert torch.equal(FP8.round_(x.clone()), in_float32(x.clamp(-448, 448).to(torch.float8_e4m3fn)))


def test_rounding_is_torch_s_cast_at_every_tie():
    codes = in_float32(E4M3)
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    around = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-1e9, 1e9)]
    for x in (codes, ties, *around):
        assert torch.equal(FP8.round_(x.clone()), x.to(torch.float8_e4m3fn).to(torch.float32))
    long = torch.cat([ties] * 200)  # rounded in several pieces
    assert torch.equal(FP8.round_(long.clone()), long.to(torch.float8_e4m3fn).to(torch.float32))


def test_every_code_is_read_exactly():
    assert torch.equal(in_float32(E4M3).nan_to_num(1e9), E4M3.to(torch.float32).nan_to_num(1e9))


@given(values=st.lists(floats, min_size=1, max_size=50))
@some
def test_the_scale_of_a_block_is_the_smallest_power_of_two_that_fits(values):
    largest = torch.tensor(values).abs().clamp(max=1e37)
    scale, clamping = block_scales(largest), block_scales(largest, clamping=True)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert torch.equal(decoded(encoded(scale)), scale)
    normal = largest > 2.0**-115  # below, exponents are limited
    codes = (largest / scale)[normal].double()
    assert bool(((codes <= 448) & (codes > 224)).all())
    floor = (largest / clamping)[normal].double()
    assert bool(((floor < 512) & (floor >= 256)).all())


@given(seed=st.integers(0, 2**32 - 1), spread_of=st.floats(0, 8))
@some
def test_the_scales_of_a_weight_have_the_least_error_of_each_block(seed, spread_of):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 96, generator=generator) * torch.exp(spread_of * torch.randn(6, 96, generator=generator))
    weight = weight.clamp(-1e18, 1e18)
    scheme = INPUTS["W8A8_MXFP8"](scheme=RULES["W8A8_MXFP8"]).weights
    error = block_errors(weight, scales_of(weight, scheme), scheme)
    for clamping in (False, True):
        other = block_scales(weight.unflatten(1, (-1, 32)).abs().amax(2), clamping)
        assert bool((error <= block_errors(weight, other, scheme) * (1 + 1e-5)).all())


def block_errors(weight, scale, scheme):
    step = spread(scale, weight)
    values = MXFP8.round_(weight / step).clamp(scheme.qmin, scheme.qmax) * step
    return (values - weight).double().square().unflatten(1, (-1, 32)).sum(2)


@pytest.mark.parametrize("scheme", FP8_SCHEMES)
def test_numbers_make_the_same_layer_again(scheme):
    torch.manual_seed(0)
    module, x = nn.Linear(64, 8), torch.randn(4, 64)
    layer = layer_of(module, scheme)
    again = build(layer.numbers, module)
    again.noise_level = layer.noise_level
    assert again.scheme == scheme
    assert torch.equal(again(x), layer(x))
    assert set(again.state_dict()) == set(layer.state_dict())
    assert not {"deq", "quant_bias"} & set(layer.state_dict())


def test_codes_of_a_weight_are_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    scheme = (
        INPUTS["W8A8_FP8"]
        .of({"input_scale": torch.tensor(1.0), "input_zero_point": torch.tensor(0)}, RULES["W8A8_FP8"])
        .weights
    )
    quantized = round_to_nearest(weight, scheme=scheme)
    scaled = weight / quantized.scale[:, None]
    assert quantized.weight.dtype == torch.float8_e4m3fn
    error = (in_float32(quantized.weight) - scaled).abs()
    assert bool((error <= (scaled.abs() / 16).clamp(min=2.0**-10) * (1 + 1e-6)).all())
    assert bool((scaled.abs().amax(1) - 448).abs().max() < 1e-3)
