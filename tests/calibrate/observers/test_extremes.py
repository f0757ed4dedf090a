"""The extremes of channels have the same bits however calls are split and merged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.observers.extremes import FEW_PROMPTS, Channels, channels_of

from ...zoo.toy import DTYPES


def channels_over(parts: list[torch.Tensor], prompts: list[int] | None = None) -> Channels:
    """Returns the extremes over `parts`, which belong to the prompts with the numbers `prompts` (None: all to one)."""
    channels = Channels()
    for part, prompt in zip(parts, prompts or [0] * len(parts), strict=True):
        channels.add(channels_of(part), prompt)
    return channels


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 39), max_size=4), st.sampled_from(DTYPES))
def test_any_split_in_any_order_gives_the_same_bits(seed, cuts, dtype):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(40, 5, generator=generator) * 100).to(dtype)
    whole = channels_over([rows])
    order = torch.randperm(40, generator=generator)
    parts = [part for part in rows[order].tensor_split(sorted(cuts)) if len(part)]
    merged = Channels()
    for part in parts:
        merged.merge(channels_over([part.view(1, -1, 5)]))
    multiplier = torch.rand(5, generator=generator) + 0.1
    for other in (channels_over(parts), merged):
        assert torch.equal(other.low, whole.low)
        assert torch.equal(other.high, whole.high)
        assert other.rows == whole.rows == 40
        assert other.range() == whole.range() == (float(rows.min()), float(rows.max()))
        assert other.range(Multiply(multiplier)) == whole.range(Multiply(multiplier))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 12))
def test_the_extremes_without_a_prompt_are_those_of_the_others_for_any_split_in_any_order(seed, prompts, cut):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-9, 10, (2, 5), generator=generator).float() for _ in prompts]  # with equal values
    order = torch.randperm(len(parts), generator=generator).tolist()
    merged = channels_over([parts[index] for index in order[:cut]], [prompts[index] for index in order[:cut]])
    merged.merge(channels_over([parts[index] for index in order[cut:]], [prompts[index] for index in order[cut:]]))
    for channels in (channels_over(parts, prompts), merged):
        for prompt in range(4):
            others = [part for part, other in zip(parts, prompts, strict=True) if other != prompt]
            found = channels.without(prompt)
            assert (found is None) == (not others)
            if found is not None:
                assert torch.equal(found.low, torch.cat(others).amin(0))
                assert torch.equal(found.high, torch.cat(others).amax(0))


@pytest.mark.parametrize("count", [FEW_PROMPTS - 1, FEW_PROMPTS])
def test_prompts_are_told_apart_only_if_they_are_few_however_calls_are_split(count):
    parts, prompts = list(torch.randn(2 * count, 3, 5)), 2 * list(range(count))
    whole, merged = channels_over(parts, prompts), channels_over(parts[:5], prompts[:5])
    merged.merge(channels_over(parts[5:], prompts[5:]))
    for channels in (whole, merged):
        assert (channels.without(0) is None) == (count == FEW_PROMPTS)
        assert torch.equal(channels.high, torch.stack(parts).amax((0, 1)))
        assert channels.rows == 6 * count


def test_the_range_is_that_of_the_multiplied_input():
    x, multiplier = torch.randn(30, 4), torch.tensor([0.01, 1.0, 5.0, 0.3])
    assert channels_over([x]).range(Multiply(multiplier)) == (
        float((x * multiplier).min()),
        float((x * multiplier).max()),
    )


def test_nothing_and_what_is_not_finite():
    with pytest.raises(ValueError, match="no values"):
        channels_of(torch.zeros(0, 4))
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="1 non-finite values"):
            channels_of(torch.tensor([[1.0, value], [2.0, 3.0]]))
    empty = Channels()
    empty.merge(Channels())
    assert empty.rows == 0
    with pytest.raises(ValueError, match="no input was observed"):
        empty.range()
