"""For the chosen scales, dividing by the scale and multiplying by its reciprocal make the same codes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.reciprocals import next_scale, reciprocal_agrees

CODES = np.arange(-127, 128)  # all codes but the lowest, -128


def number(order):
    """Returns the float32 number at each index of the ascending order of all float32 numbers. Index 0 is 0.0."""
    magnitude = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -magnitude, magnitude)


def first(function, code):
    """Returns for each code the index, as in `number`, of the smallest number at which rising `function` reaches it."""
    below, there = np.full(len(code), -(2**31 - 2**23)), np.full(len(code), 2**31 - 2**23)  # minus and plus infinity
    while (there - below > 1).any():
        middle = (below + there) // 2
        reached = function(number(middle)) >= code
        below, there = np.where(reached, below, middle), np.where(reached, middle, there)
    return there


def divided(scale, zero_point):
    return lambda x: np.rint(x / np.float32(scale) + np.float32(zero_point))


def multiplied(scale, zero_point):
    return lambda x: np.rint(x * (np.float32(1) / np.float32(scale)) + np.float32(zero_point))


def same(scale, zero_point):
    """Returns whether both functions pass from each code to the next at the same float32 number."""
    functions = divided(scale, zero_point), multiplied(scale, zero_point)
    return np.array_equal(*(first(function, CODES) for function in functions))


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(-128, 127))
def test_reciprocal_agrees_is_right_for_every_number(scale, zero_point):
    verdict = reciprocal_agrees(torch.tensor([scale]), torch.tensor([zero_point]))
    assert bool(verdict[0]) == same(scale, zero_point)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-120, 2.0**100, width=32), st.integers(-128, 127))
def test_the_next_scale_is_near_and_makes_the_same_codes_of_every_number(scale, zero_point):
    result = next_scale(scale, lambda _: zero_point)
    assert scale <= result <= 1.0005 * scale
    assert np.float32(result) == result
    assert next_scale(result, lambda _: zero_point) == result
    assert same(result, zero_point)


def test_most_scales_have_no_agreeing_reciprocal():
    scales = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 1
    zero_points = torch.arange(500) % 256 - 128
    assert reciprocal_agrees(scales, zero_points).float().mean() < 0.1


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 127])
def test_powers_of_two_stay_unchanged(zero_point):
    assert all(next_scale(2.0**power, lambda _: zero_point) == 2.0**power for power in range(-126, 110))


def test_the_zero_point_is_that_of_the_scale():
    scales = []

    def zero_point(scale):
        scales.append(scale)
        return round(-0.3 / scale) - 128

    result = next_scale(1e-3, zero_point)
    assert result in scales
    assert same(result, zero_point(result))


def test_scales_with_a_subnormal_reciprocal_have_no_agreeing_scale():
    assert next_scale(1.3 * 2.0**126, lambda _: 0) is None
