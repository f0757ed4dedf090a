"""A budget that a user writes is read as the right limits, and an invalid one is refused in one line."""

import re

import pytest

from octavo.calibrate.byte_sizes import size
from octavo.calibrate.mixed_precision.budget import Cost, budget_of
from octavo.calibrate.settings import Settings
from octavo.commands.config_file import read_config

from ...helpers.refusals import refused

FREE = float("inf")


@pytest.mark.parametrize(
    ("text", "before", "limit"),
    [
        ("5MiB", Cost(100, 8), Cost(5 * 2**20, FREE)),
        ("1.5KB", Cost(100, 8), Cost(1500, FREE)),
        ("40%", Cost(100, 8), Cost(40, FREE)),
        ("0.75x", Cost(100, 8), Cost(FREE, 6)),
        (" 40% , 0.5x", Cost(100, 8), Cost(40, 4)),
    ],
)
def test_a_budget_limits_bytes_a_share_of_them_the_time_or_two(text, before, limit):
    assert budget_of(text).limit(before) == limit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "'5' has no unit"),
        ("", "'' is not a limit"),
        ("-1x", "'-1x' is not a limit"),
        ("0%", "'0%' is not above 0"),
        ("5 MiBs", "'MiBs' is not a unit"),
        ("5MiB,40%", "limits the size twice"),
        ("0.5x,0.6x", "limits the time twice"),
    ],
)
def test_invalid_budgets_are_refused_in_one_line(text, words):
    refused(lambda: Settings(budget=text), 2, re.compile(r"^budget '"), words)


@pytest.mark.parametrize("other", [{"fallback": 2}, {"activations": "dynamic"}, {"activations": "float"}])
def test_a_budget_chooses_schemes_itself(other):
    refused(lambda: Settings(budget="40%", **other), 2, re.compile(r"^budget: "))


def test_a_budget_may_stand_in_the_file_of_options(tmp_path):
    (tmp_path / "options.toml").write_text('budget = "40%,0.7x"')
    assert read_config(tmp_path / "options.toml") == {"budget": "40%,0.7x"}


def test_a_printed_size_read_back_as_a_budget_is_large_enough():
    for count in (1, 1023, 1024, 1025, 5 << 20, (5 << 20) + 1, 123456789, 3 << 30):
        limit = budget_of(size(count)).limit(Cost())
        assert count <= limit.bytes <= 1.11 * count + 1
