"""Checks the RFLOW scheduler and the sampling loop in cases that the recorded data does not cover."""

import math
from typing import Any

import pytest
import torch

from octavo.pipelines.opensora import Conditions, RFlowScheduler, VideoShape, sample
from octavo.pipelines.opensora.conditioning import parse_mask_strategy, place_references
from octavo.pipelines.opensora.scheduler import time_ratio

from ...helpers.refusals import refused


def shape(height: float, width: float, frames: float, dtype: torch.dtype = torch.float32, rows: int = 1) -> VideoShape:
    return VideoShape(*(torch.full((rows,), value, dtype=dtype) for value in (height, width, frames)))


RATIOS = [
    (240, 426, 51, 2.4187, 2.4219),
    (240, 426, 102, 3.4206, 3.4219),
    (480, 854, 51, 4.8431, 4.8438),
    (480, 854, 102, 6.8492, 6.8438),
    (720, 1280, 51, 7.2618, 7.25),
    (720, 1280, 102, 10.270, 10.25),
]


@pytest.mark.parametrize(("height", "width", "frames", "exact", "rounded"), RATIOS)
def test_ratios_of_the_usual_sizes(height: int, width: int, frames: int, exact: float, rounded: float) -> None:
    assert time_ratio(shape(height, width, frames)).item() == pytest.approx(exact, abs=6e-4)
    assert time_ratio(shape(height, width, frames, torch.bfloat16)).float().item() == pytest.approx(rounded, abs=5e-5)


def test_times_of_the_official_240p_run() -> None:
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(30, shape=shape(240, 426, 51, torch.bfloat16))
    times = scheduler.timesteps[:, 0]
    assert times.dtype == torch.float32
    expected = torch.tensor([1000, 985.96, 971.35, 956.13, 147.48, 77.08])
    assert (times[[0, 1, 2, 3, -2, -1]] - expected).abs().max() < 6e-3


def test_discrete_times_are_whole_numbers_and_other_totals_scale() -> None:
    scheduler = RFlowScheduler(num_timesteps=500, use_discrete_timesteps=True, use_timestep_transform=False)
    scheduler.set_timesteps(7, rows=2)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [[round(500 * (1 - i / 7))] * 2 for i in range(7)]


def test_rows_of_different_sizes_have_times_of_their_own() -> None:
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(
        5, shape=VideoShape(torch.tensor([240.0, 720.0]), torch.tensor([426.0, 1280.0]), torch.tensor([51.0, 51.0]))
    )
    alone = RFlowScheduler()
    alone.set_timesteps(5, shape=shape(720, 1280, 51))
    assert torch.equal(scheduler.timesteps[:, 1:], alone.timesteps)


def test_a_step_follows_the_velocity_and_the_last_ends_at_time_zero() -> None:
    scheduler = RFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(4)
    data, noise = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 2, 3, 3)
    z = noise
    for t in scheduler.timesteps:
        z = scheduler.step(data - noise, t, z).prev_sample
    assert (z - data).abs().max() < 1e-6
    assert scheduler.step_index == 4
    refused(lambda: scheduler.step(data, t, z), 2, "set_timesteps")


def test_the_scheduler_survives_its_config() -> None:
    scheduler = RFlowScheduler(
        num_timesteps=500, use_discrete_timesteps=True, use_timestep_transform=False, transform_scale=2.0
    )
    again = RFlowScheduler.from_config(scheduler.config)
    assert dict(again.config) == dict(scheduler.config)


class Recording:
    """A velocity that depends on the caption, so that guidance has a visible effect. It records its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, z: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls.append({"z": z, "t": t, **kwargs})
        return torch.cat([kwargs["y"].view(-1, 1, 1, 1, 1) * torch.ones_like(z), torch.full_like(z, math.nan)], 1)


def conditions(scale: float | None, y: list[float], frame_mask: torch.Tensor | None = None) -> Conditions:
    rows = len(y) if scale is None else len(y) // 2
    arguments = dict(zip(VideoShape._fields, shape(240, 426, 17, rows=rows), strict=True))
    return Conditions({**arguments, "y": torch.tensor(y)}, scale, frame_mask)


def test_guidance_goes_from_the_null_row_past_the_prompt_and_junk_is_dropped() -> None:
    start = torch.zeros(2, 4, 5, 2, 2)
    moved = sample(Recording(), RFlowScheduler(), start, conditions(3.0, [1.0, 2.0, 0.5, 0.5]), 6)
    expected = torch.tensor([0.5 + 3 * 0.5, 0.5 + 3 * 1.5]).view(2, 1, 1, 1, 1).expand_as(moved)
    assert torch.allclose(moved, expected, atol=1e-5)


def test_without_guidance_there_is_one_row_a_sample() -> None:
    model = Recording()
    moved = sample(model, RFlowScheduler(), torch.zeros(1, 4, 5, 2, 2), conditions(None, [2.0]), 3)
    assert [len(call["t"]) for call in model.calls] == [1, 1, 1]
    assert torch.allclose(moved, torch.full_like(moved, 2.0), atol=1e-5)


def test_frames_are_kept_edited_and_generated_by_their_mask() -> None:
    model, scheduler = Recording(), RFlowScheduler(use_timestep_transform=False)
    start = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0.0, 0.5, 1.0]])
    moved = sample(model, scheduler, start, conditions(2.0, [1.0, 0.0], mask), 4, torch.Generator().manual_seed(5))
    assert torch.equal(moved[:, :, 0], start[:, :, 0])
    active = torch.stack([call["x_mask"] for call in model.calls])
    assert active.shape == (4, 2, 3)
    assert active[:, 0].tolist() == [[False, t <= 500, True] for t in (1000, 750, 500, 250)]
    assert torch.equal(active[:, 0], active[:, 1])
    edited = [call["z"][0, :, 1] for call in model.calls]
    assert torch.equal(edited[0], start[0, :, 1])
    assert not torch.equal(edited[2], start[0, :, 1])
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(start.shape, generator=generator) for _ in range(4)][2]
    assert torch.allclose(edited[2], 0.5 * start[0, :, 1] + 0.5 * noise[0, :, 1])


def test_a_mask_of_ones_changes_nothing_but_the_call() -> None:
    start = torch.randn(1, 4, 5, 2, 2)
    plain = sample(Recording(), RFlowScheduler(), start, conditions(7.0, [1.0, 0.3]), 5)
    masked = sample(Recording(), RFlowScheduler(), start, conditions(7.0, [1.0, 0.3], torch.ones(1, 5)), 5)
    assert torch.equal(plain, masked)


def test_strategies_fill_in_what_they_leave_out() -> None:
    assert [tuple(span) for span in parse_mask_strategy("0;1,2,-5,5,3,0.4; ")] == [
        (0, 0, 0, 0, 1, 0.0),
        (1, 2, -5, 5, 3, 0.4),
    ]
    assert parse_mask_strategy("") == []
    refused(lambda: parse_mask_strategy("0,first"), 2, "mask_strategy")


def test_references_are_placed_snapped_and_clipped() -> None:
    latents, reference = torch.zeros(1, 4, 15, 2, 2), torch.arange(1.0, 11).view(1, 10, 1, 1).expand(4, 10, 2, 2)
    placed, mask = place_references(latents, [[reference]], ["0,0,-5,11,20,0.25;0;1,0,0,5,5"])
    assert placed[0, 0, :, 0, 0].tolist() == [1.0, *[0.0] * 9, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert mask[0].tolist() == [0.0, *[1.0] * 9, *[0.25] * 5]
    assert not latents.any()
    refused(lambda: place_references(latents, [[reference]], ["0,1"]), 2, "names reference 1, counted from 0")
    refused(lambda: place_references(latents, [[reference[:, :, :1]]], ["0"]), 2, "do not fit")
