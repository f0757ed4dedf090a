"""The SQNR over several calls is the ratio of summed energies, and its interval contains the true value."""

import math

import pytest
import torch

from octavo.calibrate.replay.sqnr import Power, interval, powers_of, total


def power(signal: float, noise: float) -> Power:
    result = Power()
    result.add(torch.tensor([signal**0.5]), torch.tensor([signal**0.5 + noise**0.5]))
    return result


def test_energies_are_summed_over_calls_before_the_ratio():
    calls = [power(100.0, 1.0), power(100.0, 1e-6)]
    assert total(calls).sqnr == pytest.approx(10 * math.log10(200), abs=1e-3)
    assert total([]).sqnr is None


def test_the_interval_is_around_the_sqnr_and_narrows_with_more_calls():
    calls = [power(100.0, 1.0 + 0.3 * (position % 3)) for position in range(48)]
    widths = []
    for count in (6, 12, 48):
        low, high = interval(calls[:count])
        assert low < total(calls[:count]).sqnr < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert interval([power(100.0, 1.0)] * 8) == pytest.approx((20.0, 20.0), abs=1e-3)


def test_the_interval_holds_the_sqnr_of_all_calls_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp(0.3 * torch.randn(400, 8, generator=generator)).tolist()
    truth = 10 * math.log10(100 / math.exp(0.045))  # the mean of a lognormal number
    inside = [low <= truth <= high for low, high in (interval([power(100.0, noise) for noise in row]) for row in drawn)]
    assert 0.9 < sum(inside) / len(inside) < 0.99


def test_there_is_no_interval_of_two_calls_or_without_an_error():
    assert interval([power(1.0, 0.1)] * 2) is None
    assert interval([power(1.0, 0.0)] * 4) is None
    assert interval([]) is None


def test_one_call_with_all_of_the_error_gives_a_wide_interval():
    low, high = interval([power(1.0, 0.1), *[power(1.0, 0.0)] * 7])
    assert high - low > 15


def test_outputs_of_a_call_count_together():
    exact = [[torch.ones(2), torch.ones(3)], [torch.ones(1)]]
    other = [[tensor + 0.1 for tensor in call] for call in exact]
    assert [call_power.count for call_power in powers_of(exact, other)] == [5, 1]
