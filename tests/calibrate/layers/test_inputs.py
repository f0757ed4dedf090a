"""Each kind of activation computes what the same formula gives in whole numbers and float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import (
    INPUTS,
    RULES,
    DynamicInput,
    FloatInput,
    StaticInput,
    TimestepInput,
    scheme_name,
)
from octavo.calibrate.layers.modules import QuantizedLinear, build
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import ACTIVATION, QParams, Range, qparams_of
from octavo.calibrate.layers.schemes import (
    DYNAMIC,
    FP8_RANGED,
    FP8_SCHEMES,
    RANGED,
    SCHEMES,
    STATIC,
    TIMESTEP,
    WEIGHT_ONLY,
)
from octavo.calibrate.layers.weights import round_to_nearest

from ...helpers.examples import examples
from ...zoo.layer_kinds import EDGES, RANGES, TimedToy, frozen, input_of, static_of
from ...zoo.toy import DTYPES, nearest

KINDS = ("W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16")
MODULES = (lambda: nn.Linear(24, 5), lambda: nn.Conv2d(3, 4, 3, padding=1))


def noise_at(*levels: float) -> NoiseLevel:
    """Returns the noise level of a call whose time argument is `levels`."""
    noise = NoiseLevel()
    noise.record(TimedToy(), (torch.zeros(1), torch.tensor(levels)), {})
    return noise


def input_for(module: nn.Module, rows: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 7, 24) if isinstance(module, nn.Linear) else (rows, 3, 5, 6)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODULES)
def test_a_layer_gives_back_the_numbers_it_was_made_of(make, kind):
    module = make()
    layer = frozen(module, kind)
    numbers = layer.numbers
    assert (numbers.scheme, layer.scheme, layer.weight_only) == (kind, kind, kind == "W8A16")
    again = build(numbers, module)
    assert again.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in layer.state_dict().items())
    assert type(numbers.input) is INPUTS[kind]


@examples(300)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(-30, 30), st.booleans())
def test_dynamic_is_the_float64_formula_within_one_rounding(seed, dtype, exponent, biased):
    torch.manual_seed(seed)
    module = nn.Linear(40, 6, bias=biased).to(dtype)
    x = torch.randn(9, 40) * 2.0 ** (torch.randint(-3, 4, (9, 1)) + (exponent if dtype != torch.float16 else 0))
    x = x.to(dtype)
    layer = frozen(module, "W8A8_DYNAMIC")
    scale = x.float().abs().amax(1, keepdim=True) / 127
    q = (x.float() / scale).round()
    assert int(q.abs().max()) == 127
    total = q.double() @ layer.weight.double().T
    bias = torch.zeros(6) if layer.bias is None else layer.bias
    exact = total * scale.double() * layer.weight_scale.double() + bias.double()
    ulp = torch.finfo(torch.float32).eps * (total.abs() * scale * layer.weight_scale + bias.abs())
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + torch.finfo(dtype).tiny)
    assert bool(((layer(x).double() - exact).abs() <= 1.01 * rounding + 2 * ulp).all())


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-42])
def test_a_token_of_zeros_gives_the_bias_and_leaves_the_others_alone(make, tiny):
    module = make()
    layer = frozen(module, "W8A8_DYNAMIC")
    x = input_for(module)
    whole = layer(x)
    x[1] = tiny
    y = layer(x)
    assert torch.equal(y[1], module.bias.view(-1, *[1] * (y.ndim - 2 if x.ndim == 4 else 0)).expand_as(y[1]))
    assert torch.equal(y[0], whole[0])


def test_the_size_of_a_token_does_not_affect_the_others():
    layer = frozen(nn.Linear(24, 5), "W8A8_DYNAMIC")
    x = torch.randn(3, 24)
    grown = x * torch.tensor([[1.0], [1e6], [1e-6]])
    assert torch.equal(layer(grown)[0], layer(x)[0])
    assert torch.equal(layer(x[1]), layer(x)[1])


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("level", [-1.0, 0.0, 249.9, 250.0, 500.0, 750.0, 751.0, 1000.0])
def test_a_noise_level_has_the_numbers_of_its_bin(make, level):
    module = make()
    timed, x = frozen(module, "W8A8_TIMESTEP"), input_for(module)
    timed.noise_level = noise_at(level, level)
    bin_index = sum(edge <= level for edge in EDGES)
    assert torch.equal(timed(x), static_of(module, bin_index)(x))
    assert torch.equal(timed(x[0]), static_of(module, bin_index)(x[0]))


@pytest.mark.parametrize("make", MODULES)
def test_rows_of_several_noise_levels(make):
    module = make()
    timed, x = frozen(module, "W8A8_TIMESTEP"), input_for(module)
    timed.noise_level = noise_at(1000.0, 0.0, 300.0, 600.0)
    expected = torch.stack([static_of(module, bin_index)(row) for bin_index, row in zip((3, 0, 1, 2), x, strict=True)])
    assert torch.equal(timed(x), expected)
    largest = static_of(module, 3)
    for other in (x[:3], x[0], input_for(module, 8)):  # another number of rows: the largest noise level is used
        assert torch.equal(timed(other), largest(other))


def test_rows_without_an_axis_for_tokens_and_with_two():
    module = nn.Linear(24, 5)
    timed = frozen(module, "W8A8_TIMESTEP")
    timed.noise_level = noise_at(0.0, 1000.0)
    for shape in ((2, 24), (2, 3, 4, 24)):
        x = torch.randn(shape)
        assert torch.equal(
            timed(x), torch.stack([static_of(module, bin_index)(x[i]) for i, bin_index in ((0, 0), (1, 3))])
        )


def test_one_vector_is_no_batch():
    timed = frozen(nn.Linear(2, 3), "W8A8_TIMESTEP")
    timed.noise_level = noise_at(0.0, 1000.0)
    assert timed(torch.randn(2)).shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MODULES)
def test_a_multiplier_is_the_plain_layer_fed_the_product(make, kind, dtype):
    torch.manual_seed(3)
    module = make().to(dtype)
    multiplier = (torch.rand(module.weight.shape[1]) * 3 + 0.1).to(dtype)
    plain, smooth = frozen(module, kind), frozen(module, kind, multiplier=multiplier)
    x = input_for(module, dtype=dtype)
    along = multiplier if x.ndim == 3 else multiplier.view(-1, 1, 1)
    for layer in (plain, smooth):
        layer.noise_level = noise_at(300.0)
    assert torch.equal(smooth(x), plain(x * along))
    assert smooth.numbers.transform.factors.dtype == dtype


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_a_multiplier_that_the_dtype_does_not_hold_keeps_the_layer_float(value):
    weight = torch.ones(2, 3).half()
    reason = nearest(weight, None, DynamicInput(), multiplier=torch.tensor([1.0, value, 1.0]))
    assert reason == "float16 cannot hold the multiplier of its input"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_moves_the_output(kind, biased, dtype):
    torch.manual_seed(4)
    module = nn.Linear(24, 5, bias=biased).to(dtype)
    correction = torch.randn(5, dtype=torch.float64)
    plain, moved = frozen(module, kind), frozen(module, kind, correction=correction)
    x = input_for(module, dtype=dtype)
    for layer in (plain, moved):
        layer.noise_level = noise_at(300.0)
    y, other = plain(x).double(), moved(x).double()
    rounding = torch.finfo(dtype).eps * (y.abs() + other.abs() + correction.abs())
    step = plain.deq.max() if plain.calibrated else 0.0
    assert bool(((other - y - correction).abs() <= step + rounding).all())
    if plain.calibrated:
        assert (moved.bias is None) if not biased else torch.equal(moved.bias, module.bias)
    else:
        assert moved.bias.dtype == dtype


def test_scales_that_the_device_rounds_are_rounded_before_they_are_evaluated():
    weight = torch.randn(6, 16).bfloat16()
    for spec in (DynamicInput(), FloatInput()):
        numbers = nearest(weight, None, spec)
        assert torch.equal(numbers.weight_scale, numbers.weight_scale.bfloat16().float())
        assert not torch.equal(numbers.weight_scale, round_to_nearest(weight).scale)
        reason = nearest((weight * 1e-5).half(), None, spec)
        assert reason == "float16 cannot hold the scale of a channel's weights"


@pytest.mark.parametrize(
    "spec", [DynamicInput(), input_of("W8A8_TIMESTEP", torch.float32)], ids=["dynamic", "timestep"]
)
def test_sums_that_int32_cannot_hold_keep_the_layer_float(spec):
    fact = "its accumulator could overflow int32"
    assert nearest(torch.ones(1, 133_200), None, spec) == fact
    assert not isinstance(nearest(torch.ones(1, 66_000), None, spec), str)


def test_one_bin_that_does_not_fit_keeps_the_layer_float():
    ranges = [qparams_of(Range(0.0, high), ACTIVATION, torch.float32) for high in (1.0, 1e-7)]
    spec = TimestepInput(QParams(*(torch.stack(values) for values in zip(*ranges, strict=True))), torch.tensor([1.0]))
    assert nearest(torch.ones(2, 8), torch.full((2,), 1e3), spec) == "its accumulator could overflow int32"


def test_bins_of_timestep_are_those_of_static():
    module = nn.Linear(24, 5)
    module.weight.data[2] = 0.0
    timed = frozen(module, "W8A8_TIMESTEP").numbers
    for index in range(len(RANGES)):
        alone = static_of(module, index).numbers
        assert torch.equal(timed.deq[index], alone.deq)
        assert torch.equal(timed.quant_bias[index], alone.quant_bias)
        assert timed.input.qparams.scale[index] == alone.input.qparams.scale


def test_a_weight_rounded_elsewhere_is_used_unchanged():
    weight, bias = torch.randn(4, 8), torch.randn(4)
    one = numbers_of(round_to_nearest(weight), bias, DynamicInput(), torch.float32)
    other = nearest(weight, bias, DynamicInput())
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(QuantizedLinear(one)(weight), QuantizedLinear(other)(weight))


def test_the_names_of_schemes_are_those_of_the_inputs():
    assert {*SCHEMES, *FP8_SCHEMES} == set(INPUTS)
    assert {*RANGED, *FP8_RANGED} == {word for word, kind in INPUTS.items() if kind.ranged}
    by_name = {STATIC: StaticInput, TIMESTEP: TimestepInput, DYNAMIC: DynamicInput, WEIGHT_ONLY: FloatInput}
    assert {name: INPUTS[name] for name in SCHEMES} == by_name
    assert all(scheme_name(kind, RULES[name].element) == name for name, kind in INPUTS.items())
