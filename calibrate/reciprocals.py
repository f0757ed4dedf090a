"""Scales by which dividing and multiplying are the same: devices multiply by 1 / scale where others divide by it.

For such a scale s, its reciprocal r rounded to float32, and every float32 x, x / s and x * r round to the same whole
number wherever the results are below 255. They part only near x = (k + 1/2) s. Let s = m 2**e with 1 <= m < 2.

1. m has 15 bits and k + 1/2 has 9, so float32 holds (k + 1/2) s: any other x is off by a step of float32, and x / s off
   k + 1/2 by more than what rounding takes away, 2/m times as much at least.
2. With |r s - 1| = d 2**-24, x * r is off by d times as much again, and up to twice that where (k + 1/2) s is past the
   next power of two. So it is on the same side if d <= 1 - m/2, and a half stays a half if d <= 1/2.
"""

import math
from bisect import bisect_left
from functools import cache

import torch

_BITS = 15


@cache
def significands() -> list[float]:
    """Those of such scales between 1/2 and 1, ascending: 2**-15 times whole numbers, 1 among them."""
    half = torch.arange(2 ** (_BITS - 1), 2**_BITS + 1, dtype=torch.float64) / 2**_BITS  # m/2
    reciprocal = (1 / half).to(torch.float32).to(torch.float64)
    off = (reciprocal * half - 1).abs() * 2**24
    found: list[float] = half[off <= (1 - half).clamp_max(0.5)].tolist()
    return found


def next_scale(scale: float) -> float:
    """The smallest such scale that is not below `scale` > 0: at most 0.6 % above it, 0.02 % on average."""
    significand, exponent = math.frexp(scale)
    known = significands()
    return math.ldexp(known[bisect_left(known, significand)], exponent)
