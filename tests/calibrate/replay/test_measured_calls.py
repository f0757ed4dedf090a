"""The calls that the SQNR is measured on."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from octavo.calibrate.replay.current_call import CurrentCall, held_out
from octavo.calibrate.replay.measured_calls import MEASURED, measured_calls

from ...zoo.layer_kinds import TimedToy


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int | None


def calls(units: int, steps: int, *, named: bool = True, leveled: bool = True) -> list[Call]:
    made = []
    for unit in range(units):
        for step in range(steps):
            level = torch.full((1,), 1000.0 * (1 - step / steps))
            args = (torch.zeros(1, 20, 8), level) if leveled else (torch.zeros(1, 20, 8),)
            made.append(Call(args, {}, unit if named else None))
    return made


def chosen(samples: list[Call], wanted: int) -> list[int]:
    current = CurrentCall(TimedToy())
    list(current.tracked(samples))
    return measured_calls(current, wanted)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("units", "steps"), [(4, 8), (2, 28), (8, 28), (3, 50), (16, 4), (1, 20)])
def test_they_are_spread_over_noise_levels_and_half_of_them_are_held_out(units, steps, named):
    samples = calls(units, steps, named=named)
    found = chosen(samples, MEASURED)
    assert found == sorted(set(found))
    assert len(found) == MEASURED
    levels = sorted(float(samples[at].args[1][0]) for at in found)
    strata = Counter(int((level - 1e-3) * 4 // 1000) for level in levels)
    assert set(strata) == {0, 1, 2, 3}
    assert max(strata.values()) <= MEASURED // 4 + 2
    if named and units >= 4:
        held = sum(held_out(samples[at].unit) for at in found)
        assert MEASURED // 4 <= held <= MEASURED // 2 + 1


def test_prompts_take_turns():
    samples = calls(8, 28)
    uses = Counter(samples[at].unit for at in chosen(samples, MEASURED))
    assert {unit: uses[unit] for unit in (3, 7)} == {3: 4, 7: 4}
    assert all(1 <= uses[unit] <= 2 for unit in (0, 1, 2, 4, 5, 6))


def test_without_noise_levels_they_are_spread_over_the_places_in_a_prompt():
    samples = calls(4, 8, leveled=False)
    assert len({at % 8 for at in chosen(samples, 8)}) == 8


def test_calls_that_say_neither_level_nor_prompt_are_taken_held_out_ones_first():
    samples = calls(10, 8, named=False, leveled=False)
    assert all(held_out(at) for at in chosen(samples, MEASURED))


@pytest.mark.parametrize("count", [1, 5, 8])
def test_all_are_taken_where_there_are_no_more(count):
    samples = calls(1, count)
    assert chosen(samples, 8) == chosen(samples, 100) == list(range(count))
    assert chosen(samples, 0) == []
