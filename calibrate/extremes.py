"""The smallest and the largest value of a tensor, which also tell whether all values are finite."""

from typing import NamedTuple

import torch
from torch import Tensor


class Extremes(NamedTuple):
    """Smallest and largest value of a tensor."""

    low: float
    high: float


def extremes(x: Tensor) -> Extremes:
    """Smallest and largest value of `x`. Raises ValueError when it is empty or holds values that are not finite."""
    if x.numel() == 0:
        raise ValueError("no values")
    x = x.detach()
    # aminmax of a slice takes up to three times as long as both ends alone; of a contiguous tensor it is one pass
    ends = torch.aminmax(x) if x.is_contiguous() else (torch.amin(x), torch.amax(x))
    low, high = (end.item() for end in ends)
    if not (low - low == 0.0 and high - high == 0.0):  # NaN and infinities come through
        raise ValueError(f"{int((~x.isfinite()).sum())} of {x.numel()} values not finite")
    return Extremes(low + 0.0, high + 0.0)  # never -0.0, which would depend on the order
