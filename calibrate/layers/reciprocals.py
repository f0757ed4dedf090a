"""Scales by which dividing and multiplying are the same: devices multiply by 1 / scale where others divide by it.

For such a scale s and its zero point z, the reciprocal r of s rounded to float32, and every float32 x, x / s + z and
x * r + z round to the same code, each operation rounded to float32.

Both results rise with x, so they are the same for every x if they pass from one code to the next at the same x. For the
codes q - 1 and q this is where x / s + z rounds to q - 1/2 or next to it, so x / s is within half a step of float32 of
q - 1/2 - z: `agrees` tries all float32 numbers around the ends and the middle of that interval.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_BETWEEN = torch.arange(-127, 128, dtype=torch.float64) - 0.5  # q - 1/2 for every code q above the lowest
_HALF_STEP = torch.exp2(torch.frexp(_BETWEEN).exponent - 25)  # half a step of float32 there
_ENDS = torch.stack([_BETWEEN - _HALF_STEP, _BETWEEN, _BETWEEN + _HALF_STEP])  # what x / s + z is where codes change
_AROUND = torch.arange(-4, 5, dtype=torch.int32)  # steps of float32; the roundings of x / s and x * r move x by less
_SEARCHED = 4096  # float32 numbers: an inflation of at most 0.05 %
_CLOSE = 2.0**-28  # |r s - 1| of scales that are tried: an eighth of all, of which every second or third agrees
_AT_ONCE = 8  # scales tried together


def agrees(scales: Tensor, zero_points: Tensor) -> Tensor:
    """Whether dividing by each of `scales`, float32 (n,), and multiplying by its reciprocal make the same codes of all
    float32 numbers, with the `zero_points` (n,)."""
    scale, zero_point = scales.view(-1, 1, 1, 1), zero_points.view(-1, 1, 1, 1).to(torch.float32)
    bits = ((_ENDS.unsqueeze(-1) - zero_point) * scale.double()).to(torch.float32).view(torch.int32)
    x = (bits + _AROUND).view(torch.float32)
    divided = (x / scale).add_(zero_point).round_()
    multiplied = (x * (1 / scale)).add_(zero_point).round_()
    return (divided == multiplied).flatten(1).all(1)


def next_scale(scale: float, zero_point: Callable[[float], int]) -> float | None:
    """The smallest such scale found that is not below the float32 number `scale` > 0; `zero_point` gives that of a
    scale. None where there is none near `scale`, as for scales whose reciprocal is not a normal float32."""
    first = torch.tensor(scale, dtype=torch.float32).view(torch.int32)
    scales = (first + torch.arange(_SEARCHED, dtype=torch.int32)).view(torch.float32)
    exact = scales.double()
    off = ((1 / exact).to(torch.float32).double() * exact - 1).abs()
    for tried in scales[off <= _CLOSE].split(_AT_ONCE):
        zero_points = torch.tensor([zero_point(each) for each in tried.tolist()], dtype=torch.int32)
        found = tried[agrees(tried, zero_points)]
        if len(found):
            return float(found[0])
    return None
