"""The SQNR is measured on calls from all noise levels and prompts, about half of which are held out."""

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
    samples = []
    for unit in range(units):
        for step in range(steps):
            level = torch.full((1,), 1000.0 * (1 - step / steps))
            args = (torch.zeros(1, 20, 8), level) if leveled else (torch.zeros(1, 20, 8),)
            samples.append(Call(args, {}, unit if named else None))
    return samples


def chosen(samples: list[Call], wanted: int) -> list[int]:
    current = CurrentCall(TimedToy())
    list(current.tracked(samples))
    return measured_calls(current, wanted)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("units", "steps"), [(4, 8), (2, 28), (8, 28), (3, 50), (16, 4), (1, 20)])
def test_measured_calls_are_spread_over_noise_levels_and_half_are_held_out(units, steps, named):
    samples = calls(units, steps, named=named)
    positions = chosen(samples, MEASURED)
    assert positions == sorted(set(positions))
    assert len(positions) == MEASURED
    levels = sorted(float(samples[position].args[1][0]) for position in positions)
    strata = Counter(int((level - 1e-3) * 4 // 1000) for level in levels)
    assert set(strata) == {0, 1, 2, 3}
    assert max(strata.values()) <= MEASURED // 4 + 2
    if named and units >= 4:
        held_out_count = sum(held_out(samples[position].unit) for position in positions)
        assert MEASURED // 4 <= held_out_count <= MEASURED // 2 + 1


def test_calls_are_measured_evenly_over_prompts():
    samples = calls(8, 28)
    uses = Counter(samples[position].unit for position in chosen(samples, MEASURED))
    assert {unit: uses[unit] for unit in (3, 7)} == {3: 4, 7: 4}
    assert all(1 <= uses[unit] <= 2 for unit in (0, 1, 2, 4, 5, 6))


def test_without_noise_levels_calls_are_spread_over_positions_in_a_prompt():
    samples = calls(4, 8, leveled=False)
    assert len({position % 8 for position in chosen(samples, 8)}) == 8


def test_without_levels_and_prompts_held_out_calls_are_measured_first():
    samples = calls(10, 8, named=False, leveled=False)
    assert all(held_out(position) for position in chosen(samples, MEASURED))


@pytest.mark.parametrize("count", [1, 5, 8])
def test_all_calls_are_measured_if_there_are_few(count):
    samples = calls(1, count)
    assert chosen(samples, 8) == chosen(samples, 100) == list(range(count))
    assert chosen(samples, 0) == []
