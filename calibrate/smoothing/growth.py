"""Estimates by what factor to widen the range of a smoothed input, so that it suits prompts that were not captured.

Smoothing makes all channels of the calibration calls about equally large. Then a value of any channel that is larger in
another prompt lies outside the range and is clipped. Without smoothing, most channels are far smaller than the range,
and only the largest channels can do this. A wider range clips less and rounds more coarsely.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Scheme
from ..observers.extremes import ChannelReading, Channels

GROWTHS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # factors that are tried
# the exponent of the error of a prompt in the sum over prompts. With 1, the one or two prompts with the most extreme
# values decide, and all others pay for them: random SD3 networks lose up to 1.8 dB. Near 0, the geometric mean decides,
# and rare extreme values hardly count: the bundled pipeline, calibrated on 8 prompts, gains 0.8 dB less
_POWER = 0.25
_PART = 1 << 16  # values outside a range whose errors are computed together


class LeftOut(NamedTuple):
    """Prompts to leave out in turn. `inputs` and `group` have the extremes (prompts, in) of all other prompts for each
    prompt: those of the input, and those of all inputs that share its smoothing factors. Of the prompts' sampled rows,
    it holds the sum of squares `squares` (prompts, in), their numbers `counts` (prompts,), and the `values` (values,)
    beyond the extremes that their channel has in all other prompts: no others can lie outside a range. `prompt` and
    `channel` (values,) say where each belongs. With `taps` columns for each channel, squares and values are so many
    times too numerous."""

    inputs: ChannelReading
    group: ChannelReading
    squares: Tensor
    counts: Tensor
    values: Tensor
    prompt: Tensor
    channel: Tensor
    taps: int


def left_out(rows: Mapping[int, Tensor], inputs: Channels, group: Channels) -> LeftOut | None:
    """Returns what is left out and what remains for each prompt of `rows`, a dict from the number of the prompt to its
    sampled rows (rows, in * taps); None for a single prompt, and for 16 or more: another prompt hardly ever needs a
    wider range than so many."""
    others, left = (_stacked([channels.without(prompt) for prompt in rows]) for channels in (inputs, group))
    if others is None or left is None:
        return None
    counts = torch.tensor([len(each) for each in rows.values()], device=others.high.device)
    index = torch.arange(len(rows), device=counts.device).repeat_interleave(counts)
    x = torch.cat(list(rows.values())).to(torch.float32).unflatten(1, (others.high.shape[1], -1))
    squares = torch.zeros_like(others.high).index_add_(0, index, x.square().sum(2))
    row, channel, tap = ((x > others.high[index, :, None]) | (x < others.low[index, :, None])).nonzero(as_tuple=True)
    return LeftOut(others, left, squares, counts, x[row, channel, tap], index[row], channel, x.shape[2])


def _stacked(readings: Sequence[ChannelReading | None]) -> ChannelReading | None:
    known = [reading for reading in readings if reading is not None]
    if not known or len(known) < len(readings):
        return None
    return ChannelReading(torch.stack([low for low, _, _ in known]), torch.stack([high for _, high, _ in known]), 0)


def growth_of(left: LeftOut, multiplier: Callable[[ChannelReading], Tensor], energy: Tensor, scheme: Scheme) -> float:
    """Returns the factor of GROWTHS by which to multiply the range of a smoothed input: that with the least error on
    prompts that are left out in turn (leave-one-out cross-validation: Stone, Cross-Validatory Choice and Assessment of
    Statistical Predictions, 1974).

    Smoothing factors and range follow from the other prompts; `multiplier` returns one over the factors (prompts, in),
    given the extremes of the other prompts. The error of a prompt is that of its rows by rounding and clipping, squared
    and multiplied by `energy` (in,), the sum of the squared weights of each channel, over the same sum of the rows
    themselves. The sum over prompts of a power of this error, `_POWER`, decides. `scheme` is the rule by which inputs
    become codes. Floating-point codes round as coarsely in any range, so for them only clipping counts.
    """
    factors = multiplier(left.group).to(torch.float32)
    low, high = _ranges(left.inputs, factors, scheme)
    weights, prompt, taps = energy / factors.square(), left.prompt, left.taps
    step = (high - low) / (scheme.qmax - scheme.qmin) if scheme.element.integer else torch.zeros_like(high)
    growths = torch.tensor(GROWTHS, dtype=torch.float64, device=energy.device)[:, None]
    errors = (weights.sum(1) * step.square() / 12 * left.counts).double() * growths.square()  # (growths, prompts)
    x, energies = left.values * factors[prompt, left.channel], weights[prompt, left.channel] / taps
    for part, of, each in zip(x.split(_PART), prompt.split(_PART), energies.split(_PART), strict=True):
        excess = torch.maximum(part - growths * high[of], growths * low[of] - part).clamp_(min=0)
        errors.index_add_(1, of, excess.square_() * each)
    signal = (left.squares * energy).sum(1) / taps
    relative = errors / signal.clamp(min=torch.finfo(torch.float32).tiny)
    return GROWTHS[int(relative.pow(_POWER).sum(1).argmin())]


def _ranges(inputs: ChannelReading, factors: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Returns the ends (prompts,) of the ranges that hold the extremes `inputs` (prompts, in), multiplied by `factors`,
    and 0. Those of a symmetric `scheme` are equally far from 0."""
    low, high = (inputs.low * factors).amin(1).clamp(max=0), (inputs.high * factors).amax(1).clamp(min=0)
    if not scheme.symmetric:
        return low, high
    high = torch.maximum(high, low.neg())
    return high.neg(), high
