"""The choice of schemes with the least error under a budget, and its refinement."""

import itertools
import random

import pytest

from octavo.calibrate.mixed_precision.budget import Cost
from octavo.calibrate.mixed_precision.exchange import refine
from octavo.calibrate.mixed_precision.knapsack import Option, choose, cost_of_choice, lowest_cost

FREE = float("inf")


def groups(seed: int, count: int = 6, zero: bool = False) -> list[list[Option]]:
    """Random options: float is the dearest and has no error; others are smaller or faster, or both."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        bytes_, macs = chance.randrange(100, 1000), chance.randrange(1, 50)
        errors = [0.0 if zero and chance.random() < 0.5 else chance.random() for _ in range(3)]
        costs = [Cost(bytes_ // 4 + 8, macs / 2), Cost(bytes_ // 4 + 4, macs * 0.55), Cost(bytes_ // 4, macs)]
        words = ("W8A8", "W8A8_DYNAMIC", "W8A16")
        made.append([Option(None, 0.0, Cost(bytes_, macs)), *map(Option, words, errors, costs)])
    return made


def error(found: list[list[Option]], chosen) -> float:
    return sum(options[at].error for options, at in zip(found, chosen, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_limit_has_less_error(seed):
    found = groups(seed)
    whole, low = cost_of_choice(found, [0] * 6), lowest_cost(found)
    for share in (0.0, 0.1, 0.4, 0.8):
        limit = Cost(low.bytes + share * (whole.bytes - low.bytes), FREE)
        chosen = choose(found, limit)
        assert cost_of_choice(found, chosen).within(limit)
        every = itertools.product(range(4), repeat=6)
        best = min(error(found, each) for each in every if cost_of_choice(found, each).within(limit))
        assert error(found, chosen) == pytest.approx(best)
        assert choose(found, limit) == chosen


@pytest.mark.parametrize("axis", [0, 1])
def test_more_budget_never_has_more_error(axis):
    found = groups(3, count=40)
    whole, low = cost_of_choice(found, [0] * 40), lowest_cost(found)
    errors = []
    for share in range(0, 110, 5):
        limit = [FREE, FREE]
        limit[axis] = low[axis] + share / 100 * (whole[axis] - low[axis])
        chosen = choose(found, Cost(*limit))
        assert cost_of_choice(found, chosen).within(Cost(*limit))
        errors.append(error(found, chosen))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize("seed", range(4))
def test_both_limits_are_kept_and_cost_more_error_than_either(seed):
    found = groups(seed, count=30)
    whole = cost_of_choice(found, [0] * 30)
    limit = Cost(0.5 * whole.bytes, 0.8 * whole.time)
    both = choose(found, limit)
    assert cost_of_choice(found, both).within(limit)
    for one in (Cost(limit.bytes, FREE), Cost(FREE, limit.time)):
        assert error(found, choose(found, one)) <= error(found, both)


def test_what_has_no_error_is_quantized_first():
    found = groups(5, count=12, zero=True)
    for share in (0.3, 0.6, 1.0):
        chosen = choose(found, Cost(share * cost_of_choice(found, [0] * 12).bytes, FREE))
        for options, at in zip(found, chosen, strict=True):
            if any(option.error == 0 for option in options[1:]):
                assert options[at].kind is not None
                assert options[at].error == 0


def test_nothing_is_chosen_where_nothing_is_within_the_limit():
    found = groups(0)
    low = lowest_cost(found)
    assert choose(found, Cost(low.bytes - 1, FREE)) is None
    assert choose(found, Cost(FREE, low.time - 1)) is None
    assert cost_of_choice(found, choose(found, Cost(low.bytes, FREE))).bytes == low.bytes


def test_refining_keeps_the_limit_and_never_makes_it_worse():
    found = groups(7, count=8)
    limit = Cost(0.6 * cost_of_choice(found, [0] * 8).bytes, FREE)
    chosen = choose(found, limit)
    calls = []

    def run(each):  # errors that do not add: neighbours cancel
        calls.append(tuple(each))
        return abs(sum((-1) ** at * error([o], [c]) for at, (o, c) in enumerate(zip(found, each, strict=True)))) + 0.01

    before = run(chosen)
    best, after, exchanges = refine(found, chosen, before, limit, run, 20, lambda label, items, total: items)
    assert after <= before
    assert run(best) == after
    assert cost_of_choice(found, best).within(limit)
    assert len(set(calls)) <= 21
    assert (exchanges > 0) == (after < before)
