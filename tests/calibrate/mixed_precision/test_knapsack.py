"""The chosen schemes have the least error under a budget, and refining keeps the budget and never adds error."""

import itertools
import random

import pytest

from octavo.calibrate.mixed_precision.budget import Cost
from octavo.calibrate.mixed_precision.exchange import refine
from octavo.calibrate.mixed_precision.knapsack import Option, choose, cost_of_choice, lowest_cost

FREE = float("inf")


def groups(seed: int, count: int = 6, zero: bool = False) -> list[list[Option]]:
    """Returns random options of `count` groups. Float costs most and has no error; the others cost less bytes or time.

    With `zero`, about half of the other options have no error either.
    """
    chance = random.Random(seed)
    options = []
    for _ in range(count):
        bytes_, macs = chance.randrange(100, 1000), chance.randrange(1, 50)
        errors = [0.0 if zero and chance.random() < 0.5 else chance.random() for _ in range(3)]
        costs = [Cost(bytes_ // 4 + 8, macs / 2), Cost(bytes_ // 4 + 4, macs * 0.55), Cost(bytes_ // 4, macs)]
        words = ("W8A8", "W8A8_DYNAMIC", "W8A16")
        options.append([Option(None, 0.0, Cost(bytes_, macs)), *map(Option, words, errors, costs)])
    return options


def error(candidates: list[list[Option]], chosen) -> float:
    return sum(options[index].error for options, index in zip(candidates, chosen, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_limit_has_less_error(seed):
    candidates = groups(seed)
    whole, low = cost_of_choice(candidates, [0] * 6), lowest_cost(candidates)
    for share in (0.0, 0.1, 0.4, 0.8):
        limit = Cost(low.bytes + share * (whole.bytes - low.bytes), FREE)
        chosen = choose(candidates, limit)
        assert cost_of_choice(candidates, chosen).within(limit)
        every = itertools.product(range(4), repeat=6)
        best = min(error(candidates, choice) for choice in every if cost_of_choice(candidates, choice).within(limit))
        assert error(candidates, chosen) == pytest.approx(best)
        assert choose(candidates, limit) == chosen


@pytest.mark.parametrize("axis", [0, 1])
def test_more_budget_never_has_more_error(axis):
    candidates = groups(3, count=40)
    whole, low = cost_of_choice(candidates, [0] * 40), lowest_cost(candidates)
    errors = []
    for share in range(0, 110, 5):
        limit = [FREE, FREE]
        limit[axis] = low[axis] + share / 100 * (whole[axis] - low[axis])
        chosen = choose(candidates, Cost(*limit))
        assert cost_of_choice(candidates, chosen).within(Cost(*limit))
        errors.append(error(candidates, chosen))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize("seed", range(4))
def test_both_limits_are_kept_and_cost_more_error_than_either(seed):
    candidates = groups(seed, count=30)
    whole = cost_of_choice(candidates, [0] * 30)
    limit = Cost(0.5 * whole.bytes, 0.8 * whole.time)
    both = choose(candidates, limit)
    assert cost_of_choice(candidates, both).within(limit)
    for one in (Cost(limit.bytes, FREE), Cost(FREE, limit.time)):
        assert error(candidates, choose(candidates, one)) <= error(candidates, both)


def test_what_has_no_error_is_quantized_first():
    candidates = groups(5, count=12, zero=True)
    for share in (0.3, 0.6, 1.0):
        chosen = choose(candidates, Cost(share * cost_of_choice(candidates, [0] * 12).bytes, FREE))
        for options, index in zip(candidates, chosen, strict=True):
            if any(option.error == 0 for option in options[1:]):
                assert options[index].scheme is not None
                assert options[index].error == 0


def test_nothing_is_chosen_where_nothing_is_within_the_limit():
    candidates = groups(0)
    low = lowest_cost(candidates)
    assert choose(candidates, Cost(low.bytes - 1, FREE)) is None
    assert choose(candidates, Cost(FREE, low.time - 1)) is None
    assert cost_of_choice(candidates, choose(candidates, Cost(low.bytes, FREE))).bytes == low.bytes


def test_refining_keeps_the_limit_and_never_makes_it_worse():
    candidates = groups(7, count=8)
    limit = Cost(0.6 * cost_of_choice(candidates, [0] * 8).bytes, FREE)
    chosen = choose(candidates, limit)
    calls = []

    def run(choice):  # errors that are not additive: those of neighbouring groups cancel
        calls.append(tuple(choice))
        pairs = enumerate(zip(candidates, choice, strict=True))
        return abs(sum((-1) ** index * error([o], [c]) for index, (o, c) in pairs)) + 0.01

    before = run(chosen)
    best, after, exchanges = refine(candidates, chosen, before, limit, run, 20, lambda label, items, total: items)
    assert after <= before
    assert run(best) == after
    assert cost_of_choice(candidates, best).within(limit)
    assert len(set(calls)) <= 21
    assert (exchanges > 0) == (after < before)
