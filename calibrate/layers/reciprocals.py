"""Finds scales for which multiplying by 1 / scale gives the same codes as dividing by the scale. Some devices multiply
where others divide.

Let s be a scale, z its zero point, and r = 1 / s rounded to float32. A scale qualifies if for every float32 x the
quotient form x / s + z and the product form x * r + z round to the same code. Each operation is rounded to float32.

Both forms rise with x, so they give the same codes if each code begins at the same x in both. In the quotient form the
code q begins at the x where x / s + z, rounded to float32, reaches q - 1/2. Before this rounding, x / s + z may be up
to half a float32 step smaller or larger than q - 1/2. `reciprocal_agrees` computes the x for q - 1/2 and for half a
step below and above it, and compares both forms at all float32 numbers near these three x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_BETWEEN = torch.arange(-127, 128, dtype=torch.float64) - 0.5  # q - 1/2 for every code q above the lowest code
_HALF_STEP = torch.exp2(torch.frexp(_BETWEEN).exponent - 25)  # half a step of float32 at q - 1/2
_ENDS = torch.stack([_BETWEEN - _HALF_STEP, _BETWEEN, _BETWEEN + _HALF_STEP])  # x / s + z where codes change
_AROUND = torch.arange(
    -4, 5, dtype=torch.int32
)  # steps of float32 tried around x; the roundings of x / s and x * r are smaller
_SEARCHED = 4096  # float32 numbers searched upwards: they raise the scale by at most 0.05 %
_CLOSE = 2.0**-28  # largest |r s - 1| of scales tried: an eighth of all scales; every second or third of them agrees
_AT_ONCE = 8  # scales tried together


def reciprocal_agrees(scales: Tensor, zero_points: Tensor) -> Tensor:
    """Returns, for each of the `scales` float32 (n,), whether dividing by the scale and multiplying by its reciprocal
    give the same codes for all float32 numbers. `zero_points` (n,) has the zero point that belongs to each scale."""
    scale, zero_point = scales.view(-1, 1, 1, 1), zero_points.view(-1, 1, 1, 1).to(torch.float32)
    bits = ((_ENDS.unsqueeze(-1) - zero_point) * scale.double()).to(torch.float32).view(torch.int32)
    x = (bits + _AROUND).view(torch.float32)
    divided = (x / scale).add_(zero_point).round_()
    multiplied = (x * (1 / scale)).add_(zero_point).round_()
    return (divided == multiplied).flatten(1).all(1)


def next_scale(scale: float, zero_point: Callable[[float], int]) -> float | None:
    """Returns the smallest float32 scale found, not below `scale` > 0, for which multiplying by the reciprocal of the
    scale gives the same codes as dividing by the scale. Searches the 4096 float32 numbers from `scale` upwards, and
    leaves out those whose reciprocals have larger rounding errors.

    `zero_point` is a function that returns the zero point for a scale. Returns None if no scale is found, for example
    because the reciprocals are not normal float32 numbers.
    """
    first = torch.tensor(scale, dtype=torch.float32).view(torch.int32)
    scales = (first + torch.arange(_SEARCHED, dtype=torch.int32)).view(torch.float32)
    exact = scales.double()
    off = ((1 / exact).to(torch.float32).double() * exact - 1).abs()
    for batch in scales[off <= _CLOSE].split(_AT_ONCE):
        zero_points = torch.tensor([zero_point(value) for value in batch.tolist()], dtype=torch.int32)
        agreeing = batch[reciprocal_agrees(batch, zero_points)]
        if len(agreeing):
            return float(agreeing[0])
    return None
