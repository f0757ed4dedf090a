"""`farthest` chooses different calls from many prompts and noise levels, and the same calls each time."""

from typing import Any, NamedTuple

import pytest
import torch

from octavo.calibrate.replay.farthest_calls import descriptor_of, farthest, floats_in, points_of, statistics_of


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int | None = None


def pool(prompts: int = 8, steps: int = 7) -> list[Call]:
    """Returns calls of a denoiser. In each prompt the embedding stays the same, latents shrink and the time falls."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for unit in range(prompts):
        prompt, latents = torch.randn(1, 5, 6, generator=generator), torch.randn(1, 3, 4, 4, generator=generator)
        for step in range(steps):
            time = torch.tensor([1000.0 * (steps - step) / steps])
            calls.append(Call((latents * (1 - step / 10),), {"prompt": prompt, "timestep": time}, unit))
    return calls


def test_a_descriptor_is_of_real_floats_however_deep_they_lie():
    inner = {"a": [torch.ones(2, 3), None], "b": (torch.zeros(2, dtype=torch.long), {"c": torch.ones(4)})}
    kwargs = {"x": inner, "mask": torch.ones(3, dtype=torch.bool), "z": torch.ones(2, dtype=torch.complex64)}
    kwargs |= {"none": None, "scale": 2.0, "name": "n", "empty": torch.ones(0, 3), "timestep": torch.tensor([5.0, 7.0])}
    descriptor = descriptor_of(Call((torch.ones(()), None), kwargs))
    assert set(descriptor.statistics) == {".0.0", ".1.x.a.0", ".1.x.b.1.c"}
    assert descriptor.level == 7.0
    assert descriptor_of(Call((), {})) == (None, {}, False)
    assert [path for path, _ in floats_in(kwargs["x"])] == [".a.0", ".b.1.c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_of_channels_and_few_however_wide_the_tensor(dtype):
    tokens = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]], dtype=dtype)  # (1, tokens, channels)
    assert statistics_of(tokens).tolist() == [[1.0, -2.0], [3.0, 0.0], [5.0, 2.0]]
    assert (
        statistics_of(tokens.mT[..., None]).tolist() == statistics_of(tokens).tolist()
    )  # (1, channels, height, width)
    wide = torch.zeros(2, 4097, dtype=dtype)
    wide[1, 4096] = 9.0
    assert statistics_of(wide).shape[1] <= 64
    assert statistics_of(wide)[1].max() == 9.0
    assert statistics_of(torch.tensor([float("inf"), 1.0])).isfinite().all()


def test_all_calls_come_in_order_when_there_are_no_more_than_wanted():
    calls = pool(2, 3)
    assert farthest(calls, 6) == farthest(calls, 100) == list(range(6))
    assert farthest([], 3) == []


@pytest.mark.parametrize("wanted", [1, 2, 5, 12, 55])
def test_as_many_different_calls_as_wanted_in_order_and_the_same_each_time(wanted):
    positions = farthest(iter(pool()), wanted)
    assert positions == sorted(set(positions)) == farthest(iter(pool()), wanted)
    assert len(positions) == wanted


@pytest.mark.parametrize("outlier", [3, 20, 40])
def test_the_outlying_call_is_the_first(outlier):
    calls = pool()
    calls[outlier].args[0][0, 1, 2, 3] = 100.0
    assert farthest(calls, 1) == [outlier]


def test_equal_calls_are_taken_by_position():
    same = [Call((torch.ones(2, 3),), {}) for _ in range(5)]
    assert farthest(same, 3) == [0, 1, 2]


def test_picks_are_spread_over_noise_levels_and_prompts():
    calls = pool()
    picks = [calls[position] for position in farthest(calls, 14)]
    levels = [float(call.kwargs["timestep"]) for call in picks]
    assert len({call.unit for call in picks}) >= 6
    assert len(set(levels)) >= 4
    assert min(levels) == pytest.approx(1000.0 / 7)
    assert max(levels) == 1000.0


@pytest.mark.parametrize("wanted", [2, 3, 4, 16])
def test_prompts_that_are_held_out_have_their_share(wanted):
    calls = pool()
    held_out_count = sum(calls[position].unit % 4 == 3 for position in farthest(calls, wanted))
    assert held_out_count == max(1, round(wanted / 4))


def test_each_tensor_counts_the_same_and_what_does_not_vary_counts_nothing():
    calls = [
        Call((torch.randn(1, 2, 50), torch.randn(1, 3, 2)), {"same": torch.ones(7), "t": position})
        for position in range(9)
    ]
    points = points_of([descriptor_of(call) for call in calls])
    assert points.shape == (9, 1 + 3 * 50 + 3 * 2)
    assert float(points[:, 0].square().mean()) == pytest.approx(1.0)
    assert float(points[:, 1:151].square().sum(1).mean()) == pytest.approx(1.0)
    assert float(points[:, 151:].square().sum(1).mean()) == pytest.approx(1.0)


def test_calls_of_several_sizes_and_without_some_tensors():
    calls = [
        Call((torch.randn(1, 4, position + 1),), {"more": torch.ones(2) * position} if position % 2 else {})
        for position in range(6)
    ]
    assert len(farthest(calls, 4)) == 4
