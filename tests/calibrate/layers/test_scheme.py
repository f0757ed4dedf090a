"""Ranges to parameters, and the formula."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.scheme import (
    ACTIVATION,
    SYMMETRIC_ACTIVATION,
    WEIGHT,
    QParams,
    Range,
    codes,
    dequantize,
    exact_scale,
    qparams_of,
    quantize,
    stored_scale,
)

from ...helpers.examples import examples
from ...zoo.toy import DTYPES

ends = st.floats(-1e6, 1e6, width=32)
ranges = st.tuples(ends, ends).map(lambda pair: Range(min(pair), max(pair)))
schemes = st.sampled_from([ACTIVATION, SYMMETRIC_ACTIVATION])
dtypes = st.sampled_from(DTYPES)
many = examples(2000)


@many
@given(ranges, schemes, dtypes)
def test_parameters_are_usable_and_exact_in_the_dtype_that_stores_them(extent, scheme, dtype):
    made = qparams_of(extent, scheme, dtype)
    assume(made is not None)
    scale, zero_point = made.scale.double(), made.zero_point
    assert 0 < scale.item() < math.inf
    assert scale.to(dtype).double() == scale
    assert -128 <= zero_point <= 127
    assert zero_point.to(dtype).int() == zero_point
    assert not scheme.symmetric or zero_point == 0


@many
@given(ranges, schemes, dtypes)
def test_zero_is_exact(extent, scheme, dtype):
    made = qparams_of(extent, scheme, dtype)
    assume(made is not None)
    q = quantize(torch.zeros(1), made, scheme)
    assert q == made.zero_point
    assert dequantize(q, made, scheme).item() == 0.0


@many
@given(ranges, schemes, dtypes, st.floats(0, 1))
def test_inside_the_range_the_error_is_half_a_step_and_outside_it_clamps(extent, scheme, dtype, at):
    made = qparams_of(extent, scheme, dtype)
    assume(made is not None)
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    x = torch.tensor([low, high, low + (high - low) * at], dtype=torch.float32).clamp(low, high)
    error = (dequantize(quantize(x, made, scheme), made, scheme).double() - x.double()).abs()
    ulps = 3 * 2.0**-24 * max(-low, high)
    assert bool((error <= made.scale.double() / 2 + ulps).all())
    beyond = made.scale * torch.tensor([-1e3, 1e3])
    assert quantize(beyond, made, scheme).tolist() == [-128, 127]


@many
@given(ranges, schemes, st.integers(-20, 20))
def test_a_power_of_two_moves_the_scale_and_no_code(extent, scheme, power):
    assume(max(abs(extent.low), abs(extent.high)) > 1e-3)
    factor = 2.0**power
    one = qparams_of(extent, scheme, torch.float32)
    other = qparams_of(Range(extent.low * factor, extent.high * factor), scheme, torch.float32)
    assert other.scale == one.scale * factor
    x = torch.linspace(extent.low, extent.high, 9)
    assert torch.equal(codes(x * factor, other, scheme), codes(x, one, scheme))


@many
@given(ranges, dtypes, st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_codes_in_any_dtype_are_those_of_float64_to_one(extent, dtype, parts):
    made = qparams_of(extent, ACTIVATION, dtype)
    assume(made is not None)
    x = (torch.tensor(parts) * max(-extent.low, extent.high)).to(dtype)
    wanted = (x.double() / made.scale.double() + made.zero_point).round().clamp(-128, 127)
    assert (codes(x, made, ACTIVATION).double() - wanted).abs().max() <= 1


def test_a_range_of_one_sign_is_widened_to_zero_so_that_its_zero_point_fits():
    made = qparams_of(Range(1.0, 3.0), ACTIVATION, torch.float32)
    assert made.zero_point == -128  # without zero in the range: -255
    assert quantize(torch.tensor([3.0]), made, ACTIVATION) == 127


@pytest.mark.parametrize("scheme", [ACTIVATION, SYMMETRIC_ACTIVATION])
def test_the_range_of_zeros_has_scale_one(scheme):
    made = qparams_of(Range(0.0, 0.0), scheme, torch.float16)
    assert made.scale == 1.0
    assert quantize(torch.zeros(3), made, scheme).tolist() == [made.zero_point] * 3


@pytest.mark.parametrize("extent", [(math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0), (1.0, -1.0)])
def test_what_is_no_range_is_refused(extent):
    with pytest.raises(ValueError, match="not a range"):
        qparams_of(Range(*extent), ACTIVATION, torch.float32)


def test_float16_never_stores_a_scale_of_zero_nor_one_far_from_the_exact():
    seen = set()
    for exponent in range(-20, 5):
        scale = 1.5 * 10.0**exponent
        stored = stored_scale(scale, torch.float16)
        seen.add(stored is None)
        if stored is not None:
            assert scale <= stored <= 1.25 * scale
            assert torch.tensor(stored).half().item() == stored
    assert seen == {True, False}
    assert torch.tensor(1.5e-8).half().item() == 0.0  # what storing it unlooked-at would do
    assert stored_scale(1.5e-8, torch.float16) is None
    assert stored_scale(1e6, torch.float16) is None


@many
@given(st.floats(1e-30, 1e30), dtypes)
def test_a_stored_scale_is_the_next_one_up(scale, dtype):
    stored = stored_scale(scale, dtype)
    assume(stored is not None)
    below = (torch.tensor(stored).to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16) - 1).view(
        dtype
    )
    assert below.double().item() < scale <= stored


@settings(max_examples=50, deadline=None)
@given(ranges, schemes, st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_multiplying_by_a_reciprocal_made_for_it_makes_the_same_codes(extent, scheme, parts):
    made = qparams_of(extent, replace(scheme, reciprocal=True), torch.float32)
    assume(made is not None)
    halves = (torch.arange(-255, 255) + 0.5) * made.scale
    x = torch.cat([halves, torch.tensor(parts) * max(-extent.low, extent.high)])
    q = (x * (1 / made.scale) + made.zero_point).round().clamp(-128, 127)
    assert torch.equal(codes(x, made, scheme), q)


@pytest.mark.parametrize("zero_point", [-128, -127, -3, 0, 1, 64, 127])
@pytest.mark.parametrize("scale", [1.0, 0.037, 201 * 2.0**-13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_zero_point_is_added_before_rounding_in_float32(scale, zero_point, dtype):
    ties = ((torch.arange(-300, 300) + 0.5) * scale).to(dtype)
    near = [ties.nextafter(ties + scale), ties.nextafter(ties - scale)] if dtype != torch.bfloat16 else []
    x = torch.cat([ties, *near])
    quotient = x.float().numpy() / np.float32(scale)
    wanted = np.clip(np.rint(quotient + np.float32(zero_point)), -128, 127)
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
    assert np.array_equal(codes(x, qparams, ACTIVATION).numpy(), wanted)
    assert np.array_equal(quantize(x, qparams, ACTIVATION).numpy(), wanted)
    rounded_first = np.clip(np.rint(quotient) + zero_point, -128, 127)
    if scale == 1.0:
        differs = (rounded_first != wanted)[: len(ties)].any()
        assert differs == bool(zero_point % 2)


def test_widest_ranges_do_not_overflow():
    assert exact_scale(Range(-1.7e308, 1.7e308), ACTIVATION) < math.inf


def test_a_large_weight_is_quantized_in_pieces_as_it_is_whole():
    weight = torch.randn(70, 3, 40, 33, generator=torch.Generator().manual_seed(0))
    qparams = QParams(weight.abs().amax((1, 2, 3)) / 127, torch.zeros(70, dtype=torch.int32))
    assert torch.equal(quantize(weight, qparams, WEIGHT), codes(weight, qparams, WEIGHT).to(torch.int8))
    assert quantize(weight[:0], QParams(torch.tensor(1.0), torch.tensor(0)), ACTIVATION).shape == (0, 3, 40, 33)
