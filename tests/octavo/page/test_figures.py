"""Checks that the axes of the page's figures have ticks in plain numbers, for any range of the values."""

import re

import pytest

from octavo.page import figures


def words(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.mark.parametrize(
    ("low", "high"), [(2.1, 4.4), (3.0, 3.0), (0.97, 1.04), (1e-6, 3e-6), (41.0, 47.0), (1e-4, 1e4)]
)
def test_a_colour_bar_has_plain_numbers_over_any_range(low, high):
    heat = {"layers": ["a", "b"], "steps": [1, 2], "maximum": [[low, high], [high, low]]}
    shown = words(figures.heat(heat))
    bar = shown[: shown.index("largest |input|")]
    ticks = [float(text) for text in shown if re.fullmatch(r"[\d.]+(e-?\d+)?", text)]
    assert not any(mark in text for text in shown for mark in "\\$")
    assert bar or ticks


@pytest.mark.parametrize(("low", "high"), [(0.021, 0.044), (0.03, 0.03), (1e-5, 0.2)])
def test_the_axis_of_a_trajectory_has_plain_numbers_over_any_range(low, high):
    steps = [{"smallest": low, "median": (low * high) ** 0.5, "largest": high} for _ in range(4)]
    shown = words(figures.trajectory(steps))
    assert not any(mark in text for text in shown for mark in "\\$")
    assert sum(text.endswith("%") for text in shown) > 1
