"""Scales by which dividing and multiplying are the same."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.reciprocals import next_scale, significands

HALVES = torch.arange(1, 510, 2, dtype=torch.float64) / 2  # between two codes, 254.5 the largest
AROUND = torch.arange(-4, 5, dtype=torch.int32)  # steps of float32


def rounded(scales):
    """x / scale and x * (1 / scale), rounded, for the float32 numbers x around each half: (scales, halves, around)."""
    bits = (scales[:, None] * HALVES).to(torch.float32).view(torch.int32)
    x, scale = (bits[..., None] + AROUND).view(torch.float32), scales.to(torch.float32)[:, None, None]
    return (x / scale).round(), (x * (1 / scale)).round()


def test_every_such_scale_makes_the_same_codes_of_every_number():
    for scales in torch.tensor(significands(), dtype=torch.float64).split(800):
        divided, multiplied = rounded(scales)
        assert torch.equal(divided, multiplied)
        # both rise with x, so what is between the outermost numbers of one half and the next has one code
        assert bool((divided[..., 0] == HALVES - 0.5).all())
        assert bool((divided[..., -1] == HALVES + 0.5).all())


def test_other_scales_part():
    generator = torch.Generator().manual_seed(0)
    divided, multiplied = rounded((torch.rand(500, generator=generator) + 1).double())
    assert (divided != multiplied).any(-1).any(-1).float().mean() > 0.9
    short = torch.tensor([0.75 + 3 * 2.0**-15], dtype=torch.float64)  # 15 bits are not enough
    assert short.item() not in significands()
    assert not torch.equal(*rounded(short))


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-120, 2.0**100))
def test_the_next_one_is_near_and_serves_at_any_exponent(scale):
    found = next_scale(scale)
    assert scale <= found <= 1.006 * scale
    assert torch.tensor(found, dtype=torch.float64).float().double().item() == found
    assert next_scale(found) == found
    assert next_scale(4 * scale) == 4 * found
    assert torch.equal(*rounded(torch.tensor([found], dtype=torch.float64)))


def test_powers_of_two_stay():
    assert all(next_scale(2.0**power) == 2.0**power for power in range(-126, 120))
    assert significands()[-1] == 1.0
    assert math.isclose(significands()[0], 0.5)
