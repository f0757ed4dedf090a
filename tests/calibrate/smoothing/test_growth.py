"""Ranges of smoothed inputs are widened as far as prompts that are left out need, and no farther."""

import pytest
import torch

from octavo.calibrate.layers.scheme import ACTIVATION, FP8, Scheme
from octavo.calibrate.observers.extremes import FEW_PROMPTS, ChannelReading, Channels, channels_of
from octavo.calibrate.smoothing.growth import GROWTHS, growth_of, left_out

from ..observers.test_extremes import channels_over

CHANNELS = 16
ROWS = 32


def inputs(prompts: int, special: float = 1.0) -> dict[int, torch.Tensor]:
    """Returns rows of several prompts, uniform from -1 to 1. In each prompt half of the rows have values up to
    `special` in a channel of the prompt's own."""
    generator = torch.Generator().manual_seed(0)
    rows = {prompt: 2 * torch.rand(ROWS, CHANNELS, generator=generator) - 1 for prompt in range(prompts)}
    for prompt, values in rows.items():
        values[::2, prompt % CHANNELS] *= special
    return rows


def ones_for(channels: ChannelReading) -> torch.Tensor:
    """Returns multipliers that leave the input as it is."""
    return torch.ones_like(channels.high)


def growth(rows: dict[int, torch.Tensor], scheme: Scheme = ACTIVATION, channels: Channels | None = None) -> float:
    """Returns the growth with factors that make all channels equally large."""
    seen = channels or channels_over(list(rows.values()), list(rows))

    def multiplier(channels: ChannelReading) -> torch.Tensor:
        return 1 / torch.maximum(channels.high, channels.low.neg()).clamp(min=1e-6)

    return growth_of(left_out(rows, seen, seen), multiplier, torch.ones(CHANNELS), scheme)


def test_a_single_prompt_and_prompts_with_the_same_values_leave_the_range():
    alone = inputs(1, special=5.0)
    seen = channels_over(list(alone.values()), list(alone))
    assert left_out(alone, seen, seen) is None
    rows = inputs(1, special=5.0)[0]
    assert growth(dict.fromkeys(range(4), rows)) == 1.0


@pytest.mark.parametrize("special", [1.5, 2.5, 3.5])
def test_the_range_grows_with_what_is_larger_in_each_prompt_alone(special):
    found = growth(inputs(6, special))
    assert special / 1.35 <= found <= special * 1.2
    assert growth(inputs(6)) <= 1.1 < found


def test_prompts_that_share_their_largest_values_need_no_growth():
    rows = inputs(6, special=3.0)
    shared = {prompt: torch.cat([rows[prompt], rows[prompt ^ 1]]) for prompt in rows}
    assert growth(shared) <= 1.1 < growth(rows)


def test_the_ranges_of_many_prompts_stay():
    rows = inputs(FEW_PROMPTS, special=3.0)
    seen = channels_over(list(rows.values()), list(rows))
    assert left_out(rows, seen, seen) is None


def test_a_few_values_of_channels_with_small_weights_are_clipped_rather():
    """A range that is 30 times as large would round all other values 30 times as coarsely."""
    rows = inputs(6)
    rows[0][0, 0] = 30.0
    weights = torch.ones(CHANNELS)
    weights[0] = 1e-8
    seen = channels_over(list(rows.values()), list(rows))
    assert growth_of(left_out(rows, seen, seen), ones_for, weights, ACTIVATION) <= 1.1


def test_floating_point_codes_round_as_coarsely_in_any_range_so_nothing_is_clipped():
    rows = inputs(6)
    rows[0][0, 0] = 3.8
    weights = torch.full((CHANNELS,), 100.0)
    weights[0] = 1e-3
    seen = channels_over(list(rows.values()), list(rows))
    found = [growth_of(left_out(rows, seen, seen), ones_for, weights, scheme) for scheme in (Scheme(FP8), ACTIVATION)]
    assert found[0] == GROWTHS[-1] == 4.0
    assert found[1] <= 1.1


def test_patches_of_a_convolution_have_a_column_for_each_place_of_the_kernel():
    rows = inputs(6, special=2.5)
    patches = {prompt: values[:, :, None].expand(-1, -1, 9).flatten(1) for prompt, values in rows.items()}
    seen = channels_over(list(rows.values()), list(rows))
    assert growth(patches, channels=seen) == growth(rows, channels=seen)


def test_the_extremes_of_a_survey_reach_beyond_the_sampled_rows():
    """The range of the other prompts counts all their rows, so what any of them holds needs no growth."""
    rows = inputs(3, special=3.0)
    seen = channels_over(list(rows.values()), list(rows))
    seen.add(channels_of(torch.cat([torch.full((1, CHANNELS), 3.0), torch.full((1, CHANNELS), -3.0)])), 7)
    seen.add(channels_of(torch.cat([torch.full((1, CHANNELS), 3.0), torch.full((1, CHANNELS), -3.0)])), 8)
    ones = torch.ones(CHANNELS)
    assert growth_of(left_out(rows, seen, seen), ones_for, ones, ACTIVATION) == 1.0
