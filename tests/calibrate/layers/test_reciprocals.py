"""Scales by which dividing and multiplying are the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.reciprocals import next_scale, reciprocal_agrees

CODES = np.arange(-127, 128)  # all but the lowest


def number(order):
    """The float32 numbers in ascending order: 0 stands for 0.0."""
    magnitude = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -magnitude, magnitude)


def first(function, code):
    """The place in `number` of the first float32 number of which the rising `function` makes at least each `code`."""
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
    """Whether both functions pass from each code to the next at the same float32 number."""
    functions = divided(scale, zero_point), multiplied(scale, zero_point)
    return np.array_equal(*(first(function, CODES) for function in functions))


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(-128, 127))
def test_what_is_said_of_a_scale_is_true_of_every_number(scale, zero_point):
    said = reciprocal_agrees(torch.tensor([scale]), torch.tensor([zero_point]))
    assert bool(said[0]) == same(scale, zero_point)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-120, 2.0**100, width=32), st.integers(-128, 127))
def test_the_next_one_is_near_and_makes_the_same_codes_of_every_number(scale, zero_point):
    found = next_scale(scale, lambda _: zero_point)
    assert scale <= found <= 1.0005 * scale
    assert np.float32(found) == found
    assert next_scale(found, lambda _: zero_point) == found
    assert same(found, zero_point)


def test_other_scales_part():
    scales = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 1
    zero_points = torch.arange(500) % 256 - 128
    assert reciprocal_agrees(scales, zero_points).float().mean() < 0.1


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 127])
def test_powers_of_two_stay(zero_point):
    assert all(next_scale(2.0**power, lambda _: zero_point) == 2.0**power for power in range(-126, 110))


def test_the_zero_point_is_that_of_the_scale():
    asked = []

    def zero_point(scale):
        asked.append(scale)
        return round(-0.3 / scale) - 128

    found = next_scale(1e-3, zero_point)
    assert found in asked
    assert same(found, zero_point(found))


def test_scales_with_no_such_reciprocal_have_none_near():
    assert next_scale(1.3 * 2.0**126, lambda _: 0) is None
