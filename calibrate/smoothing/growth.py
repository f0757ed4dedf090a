"""Estimates by what factor to widen the range of a smoothed input, so that it suits prompts that were not captured.

Smoothing makes all channels of the calibration calls about equally large. Then a value of any channel that is larger in
another prompt lies outside the range and is clipped. Without smoothing, most channels are far smaller than the range,
and only the largest channels can do this. A wider range clips less and rounds more coarsely.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import Range, Scheme
from ..layers.transforms import Multiply, transformed_patches
from ..observers.extremes import Channels

GROWTHS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # factors that are tried
# how much more a squared error of clipping counts than one of rounding: the same few values are clipped in every call,
# so these errors add up over layers. From 10 to 30 the results of the models of docs/accuracy.md differ by 0.2 dB
_CLIPPING = 30.0
_PART = 1 << 16  # values outside a range whose errors are computed together


class LeftOut(NamedTuple):
    """A prompt that is left out: its sampled `rows` (rows, in * taps), and the extremes of the other prompts, of the
    input and of the `group` of all inputs that share the smoothing factors."""

    rows: Tensor
    inputs: Channels
    group: Channels


def left_out(rows: Mapping[int, Tensor], inputs: Channels, group: Channels) -> list[LeftOut]:
    """Returns what is left out and what remains for each prompt of `rows`, a dict from the number of the prompt to its
    rows. Prompts without which `inputs` or `group` have no values are not in the list."""
    pairs = [(values, inputs.without(prompt), group.without(prompt)) for prompt, values in rows.items()]
    return [LeftOut(values, one, other) for values, one, other in pairs if one is not None and other is not None]


def growth_of(
    prompts: Iterable[LeftOut], multiplier: Callable[[Channels], Tensor], energy: Tensor, scheme: Scheme
) -> float:
    """Returns the factor of GROWTHS by which to multiply the range of a smoothed input: that with the least error on
    `prompts`, which are left out in turn (leave-one-out cross-validation: Stone, Cross-Validatory Choice and Assessment
    of Statistical Predictions, 1974). Without prompts, returns 1.

    Smoothing factors and range follow from the other prompts; `multiplier` returns one over the factors (in,), given
    the extremes of the other prompts. The error of the prompt's rows is the squared error of rounding and clipping,
    multiplied by `energy` (in,), the sum of the squared weights of each channel; clipping counts more (`_CLIPPING`).
    `scheme` is the rule by which inputs become codes. Floating-point codes round as coarsely in any range, so for them
    only clipping counts.
    """
    growths = torch.tensor(GROWTHS, device=energy.device)
    errors = torch.zeros(len(GROWTHS), dtype=torch.float64, device=energy.device)
    for values, seen, group in prompts:
        transform = Multiply(multiplier(group))
        taps = values.shape[1] // len(transform.factors)
        weights = (energy / transform.factors.to(torch.float32).square() / taps).repeat_interleave(taps)
        low, high = _codes_range(seen.range(transform), scheme)
        x = transformed_patches(transform, values, taps).to(torch.float32)
        outside = ((x < low) | (x > high)).nonzero(as_tuple=True)
        step = (high - low) / (scheme.qmax - scheme.qmin) if scheme.element.integer else 0.0
        errors += len(values) * float(weights.sum()) * step**2 / 12 * growths.square()
        for part, counts in zip(x[outside].split(_PART), weights[outside[1]].split(_PART), strict=True):
            excess = torch.maximum(part - growths[:, None] * high, growths[:, None] * low - part).clamp_(min=0)
            errors += _CLIPPING * (excess.square() * counts).sum(1)
    return GROWTHS[int(errors.argmin())]


def _codes_range(extent: Range, scheme: Scheme) -> Range:
    """Returns the range that the codes of `scheme` represent if it was chosen for the values in `extent`."""
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    return Range(-max(-low, high), max(-low, high)) if scheme.symmetric else Range(low, high)
