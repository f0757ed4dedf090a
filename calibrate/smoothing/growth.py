"""Estimates by what factor to widen the range of a smoothed input, so that it suits prompts that were not captured.

Smoothing makes all channels of the calibration calls about equally large. Then a value of any channel that is larger in
another prompt lies outside the range and is clipped. Without smoothing, most channels are far smaller than the range,
and only the largest channels can do this. A wider range clips less and rounds more coarsely.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Scheme
from ..observers.extremes import ChannelReading, Channels

GROWTHS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # factors that are tried
# how much more a squared error of clipping counts than one of rounding: the same few values are clipped in every call,
# so these errors add up over layers. From 10 to 30 the results of the models of docs/accuracy.md differ by 0.2 dB
_CLIPPING = 30.0
_PART = 1 << 16  # values outside a range whose errors are computed together


class LeftOut(NamedTuple):
    """Prompts to leave out in turn. `rows` (rows, in * taps) are sampled rows, and `prompt` (rows,) says to which of
    the prompts each belongs. `inputs` and `group` have the extremes (prompts, in) of all other prompts for each prompt:
    those of the input, and those of all inputs that share its smoothing factors."""

    rows: Tensor
    prompt: Tensor
    inputs: ChannelReading
    group: ChannelReading


def left_out(rows: Mapping[int, Tensor], inputs: Channels, group: Channels) -> LeftOut | None:
    """Returns what is left out and what remains for each prompt of `rows`, a dict from the number of the prompt to its
    sampled rows; None for fewer than two prompts. Prompts without which `inputs` or `group` have no values are not left
    out."""
    prompts = inputs.without(list(rows)).high.isfinite().all(1) & group.without(list(rows)).high.isfinite().all(1)
    kept = {prompt: rows[prompt] for prompt, known in zip(rows, prompts.tolist(), strict=True) if known}
    if not kept:
        return None
    counts = torch.tensor([len(values) for values in kept.values()])
    index = torch.arange(len(kept)).repeat_interleave(counts).to(inputs.high.device)
    return LeftOut(torch.cat(list(kept.values())), index, inputs.without(list(kept)), group.without(list(kept)))


def growth_of(left: LeftOut, multiplier: Callable[[ChannelReading], Tensor], energy: Tensor, scheme: Scheme) -> float:
    """Returns the factor of GROWTHS by which to multiply the range of a smoothed input: that with the least error on
    prompts that are left out in turn (leave-one-out cross-validation: Stone, Cross-Validatory Choice and Assessment of
    Statistical Predictions, 1974).

    Smoothing factors and range follow from the other prompts; `multiplier` returns one over the factors (prompts, in),
    given the extremes of the other prompts. The error of the prompt's rows is the squared error of rounding and
    clipping, multiplied by `energy` (in,), the sum of the squared weights of each channel; clipping counts more
    (`_CLIPPING`). `scheme` is the rule by which inputs become codes. Floating-point codes round as coarsely in any
    range, so for them only clipping counts.
    """
    factors = multiplier(left.group).to(torch.float32)
    low, high = (left.inputs.low * factors).amin(1).clamp(max=0), (left.inputs.high * factors).amax(1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, low.neg())
        low = high.neg()
    weights = energy / factors.square()
    x = (left.rows.unflatten(1, (len(energy), -1)) * factors[left.prompt, :, None]).flatten(1)
    taps = x.shape[1] // len(energy)
    places = ((x < low[left.prompt, None]) | (x > high[left.prompt, None])).nonzero(as_tuple=True)
    prompt, x, outer = left.prompt[places[0]], x[places], weights[left.prompt[places[0]], places[1] // taps] / taps
    growths = torch.tensor(GROWTHS, device=energy.device)
    step = (high - low) / (scheme.qmax - scheme.qmin) if scheme.element.integer else torch.zeros_like(high)
    rounding = (weights.sum(1) * step.square() / 12)[left.prompt].sum(dtype=torch.float64)
    errors = rounding * growths.square()
    for part, ends, counts in zip(x.split(_PART), prompt.split(_PART), outer.split(_PART), strict=True):
        excess = torch.maximum(part - growths[:, None] * high[ends], growths[:, None] * low[ends] - part)
        errors += _CLIPPING * (excess.clamp_(min=0).square() * counts).sum(1)
    return GROWTHS[int(errors.argmin())]
