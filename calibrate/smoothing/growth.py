"""Estimates how much larger the range of a smoothed input becomes with the calls of one more prompt.

Smoothing makes all channels of the calibration calls about equally large. Then a value of any channel that is larger in
another prompt lies outside the range and is clipped. Without smoothing, most channels are far smaller than the range,
and only the largest channels can do this.

The estimate leaves out each prompt in turn (leave-one-out cross-validation: Stone, Cross-Validatory Choice and
Assessment of Statistical Predictions, 1974).
"""

import math

import torch
from torch import Tensor

from ..observers.extremes import Peaks


def growth_of(inputs: Peaks, group: Peaks, multiplier: Tensor, alpha: float, prompts: int) -> float:
    """Returns by what factor, at least 1, the range of a smoothed input is expected to grow with one more prompt.

    Each of the `prompts` is left out in turn: the largest smoothed value of this prompt is divided by the range of the
    other prompts, where the smoothing factors are those that follow from the other prompts alone. The result is the
    geometric mean of these ratios, in which a ratio below 1 counts as 1. With one prompt, returns 1.

    `inputs` has the peaks of the input, and `group` those from which the factors were computed, which are of all inputs
    that share the factors. `multiplier` (in,) is one over the factors, and `alpha` their exponent (`multiplier_of`).
    """
    largest, second, base = (values.to(torch.float64) for values in (inputs.largest, inputs.second, multiplier))
    moved = base * (group.largest.to(torch.float64) / group.second.to(torch.float64).clamp(min=1e-30)) ** alpha
    moved = torch.where(group.second > 0, moved, 1.0)  # one over the factors without the prompt of `group.largest`
    same = inputs.prompt == group.prompt
    without = torch.where(same, moved, base)  # the same without the prompt of `inputs.largest`
    owners, index = torch.cat([inputs.prompt, group.prompt]).unique(return_inverse=True)
    own, moving = index.tensor_split(2)

    def by_prompt(values: Tensor, index: Tensor) -> Tensor:
        zeros = torch.zeros(len(owners), dtype=torch.float64, device=values.device)
        return zeros.scatter_reduce(0, index, values, "amax")

    peaks = by_prompt(largest * base, own)
    first, *rest = peaks.topk(min(2, len(peaks))).values
    others = torch.where(peaks < first, first, rest[0] if rest else 0.0)  # the largest peak of the other prompts
    ranges = torch.maximum(others, by_prompt(second * without, own))
    ranges = torch.maximum(ranges, by_prompt(torch.where(same, second, largest) * moved, moving))
    ratios = by_prompt(largest * without, own)[ranges > 0] / ranges[ranges > 0]
    return math.exp(float(ratios.clamp(min=1.0).log().sum()) / prompts)
