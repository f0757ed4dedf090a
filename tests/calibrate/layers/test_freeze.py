"""The numbers of a frozen layer are exact, fit their dtypes, and compute what the float values of the codes compute."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.layers.freeze import numbers_of, rounded_deq
from octavo.calibrate.layers.inputs import FloatInput, StaticInput
from octavo.calibrate.layers.modules import QuantizedLinear, build
from octavo.calibrate.layers.scheme import ACTIVATION, Range, dequantize, qparams_of, quantize
from octavo.calibrate.rounding.methods import WEIGHT_METHODS

from ...helpers.examples import examples
from ...zoo.toy import DTYPES, nearest

many = examples(1000)
seeds = st.integers(0, 2**32 - 1)


biases = st.one_of(st.just(0.0), st.floats(-64, -(2.0**-100), width=32), st.floats(2.0**-100, 64, width=32))


def layer(seed: int, dtype: torch.dtype, k: int = 24, n: int = 5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 10.0 ** (seed % 5 - 3)
    bias = torch.randn(n, generator=generator) * 10.0 ** (seed % 3 - 1)
    x = torch.randn(7, k, generator=generator) * 10.0 ** (seed % 4 - 2) + (seed % 3 - 1)
    weight[seed % n] *= seed % 2
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


def frozen(weight, bias, x, method="round-to-nearest"):
    qparams = qparams_of(Range(float(x.min()), float(x.max())), ACTIVATION, weight.dtype)
    assume(qparams is not None)
    return numbers_of(WEIGHT_METHODS[method](weight, None), bias, StaticInput(qparams), weight.dtype)


@many
@given(seeds, st.sampled_from(DTYPES))
def test_deq_is_the_stored_scale_times_the_weights_on_19_bits(seed, dtype):
    weight, bias, x = layer(seed, dtype)
    numbers = frozen(weight, bias, x)
    a, qparams = numbers, numbers.input.qparams
    stored = qparams.scale.to(dtype).float()  # the scale that a consumer reads
    filled = (numbers.weight != 0).any(1)
    assert torch.equal(a.deq[filled], rounded_deq(stored * numbers.weight_scale)[filled])
    assert int((a.deq.view(torch.int32) & 0x1FFF).sum()) == 0
    assert a.deq.numel() == a.quant_bias.numel() == weight.shape[0]
    assert a.quant_bias.dtype == torch.int32
    bound = a.quant_bias.double().abs().max() + 128 * 127 * weight.shape[1]
    assert bound < 2**31


@many
@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_rounding_to_19_bits_is_to_the_nearest(value):
    x = torch.tensor([value])
    rounded = rounded_deq(x)
    step = 2.0 ** (torch.frexp(x).exponent.item() - 11)
    assert abs(rounded.double().item() - value) <= step / 2
    assert torch.equal(rounded_deq(rounded), rounded)


@many
@given(seeds, st.sampled_from(DTYPES))
def test_the_integers_compute_what_their_float_values_do(seed, dtype):
    weight, bias, x = layer(seed, dtype)
    numbers = frozen(weight, bias, x)
    a, qparams = numbers, numbers.input.qparams
    y = QuantizedLinear(numbers)(x.float()).double()
    x_q = dequantize(quantize(x, qparams, ACTIVATION), qparams, ACTIVATION).double() / qparams.scale.double()
    wanted = x_q @ numbers.weight.double().T * a.deq.double() + bias.double()
    assert bool(((y - wanted).abs() <= 0.51 * a.deq.double() + 1e-6 * wanted.abs()).all())


@many
@given(seeds, st.sampled_from(DTYPES), biases)
def test_a_channel_of_zeros_gives_its_bias_exactly(seed, dtype, value):
    weight, bias, x = layer(seed, dtype)
    weight[2], bias[2] = 0.0, value
    numbers = frozen(weight, bias, x)
    assert numbers.weight_scale[2] == 1.0
    assert bool((QuantizedLinear(numbers)(x)[:, 2] == bias[2]).all())


@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_channel_of_tiny_weights_holds_its_bias_and_costs_other_channels_nothing(size, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, groups=groups).requires_grad_(False)
    conv.weight[1] *= size
    conv.bias[1] = 3.0
    qparams = qparams_of(Range(-0.1, 0.25), ACTIVATION, torch.float32)
    plain = nearest(conv.weight, torch.zeros(4), StaticInput(qparams))
    numbers = nearest(conv.weight, conv.bias, StaticInput(qparams))
    others = torch.tensor([0, 2, 3])
    assert torch.equal(numbers.weight[others], plain.weight[others])
    assert torch.equal(numbers.weight_scale[others], plain.weight_scale[others])
    x = torch.rand(2, 8, 5, 5) * 0.35 - 0.1
    exact = conv.double()(x.double())[:, 1]
    error, without_bias = (build(each, conv)(x)[:, 1].double() - exact for each in (numbers, plain))
    raised = conv.weight[0].numel() * 3.0 * 2**-23 + 3.0 * 2**-22  # the last term: the rounding of float32
    assert float(error.abs().max()) <= float((without_bias + 3.0).abs().max()) + raised


def test_a_bias_that_an_integer_layer_cannot_hold_is_never_wrapped():
    assert torch.tensor(1e11, dtype=torch.float64).to(torch.int32) == -(2**31)  # a plain cast would give this
    qparams = qparams_of(Range(0.0, 0.25), ACTIVATION, torch.float32)
    numbers = nearest(torch.full((2, 8), 1e-7), torch.tensor([1.0, -1.0]), StaticInput(qparams))
    assert torch.equal(numbers.quant_bias.sign(), torch.tensor([1, -1], dtype=torch.int32))


def test_a_sum_that_int32_cannot_hold_keeps_the_layer_float():
    qparams = qparams_of(Range(-1.0, 1.0), ACTIVATION, torch.float32)
    assert nearest(torch.ones(1, 132_200), None, StaticInput(qparams)) == "its accumulator could overflow int32"
    assert not isinstance(nearest(torch.ones(1, 131_000), None, StaticInput(qparams)), str)


def test_scales_beyond_float32_keep_the_layer_float():
    qparams = qparams_of(Range(0.0, 1e-30), ACTIVATION, torch.float32)
    assert "outside float32" in str(nearest(torch.full((1, 4), 1e-20), None, StaticInput(qparams)))


def test_the_correction_of_a_convolution_is_one_number_for_each_output():
    weight = torch.arange(3 * 2 * 3 * 3).reshape(3, 2, 3, 3).float()
    qparams = qparams_of(Range(-1.0, 3.0), ACTIVATION, torch.float32)
    numbers = nearest(weight, torch.zeros(3), StaticInput(qparams))
    wanted = -int(qparams.zero_point) * numbers.weight.long().sum((1, 2, 3))
    assert torch.equal(numbers.quant_bias.long(), wanted)


def test_without_a_bias_there_is_still_the_correction():
    qparams = qparams_of(Range(0.0, 3.0), ACTIVATION, torch.float32)
    numbers = nearest(torch.ones(2, 3), None, StaticInput(qparams))
    assert numbers.bias is None
    assert numbers.quant_bias.tolist() == [128 * 3 * 127] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_weight_is_frozen_without_parameters_of_the_input(dtype):
    weight, bias, x = layer(1, dtype)
    numbers = nearest(weight, bias, FloatInput())
    assert isinstance(numbers.input, FloatInput)
    assert QuantizedLinear(numbers)(x).dtype == dtype
