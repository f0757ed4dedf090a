"""Scales by which dividing and multiplying are the same: devices multiply by 1 / scale where others divide by it.

For such a scale s, its reciprocal r rounded to float32, and every float32 x, x / s and x * r round to the same whole
number wherever the results are below 255. The two could differ only near x = h s, where h is a whole number and a half.

Let s = m 2**e and h = n 2**f with 1 <= m, n < 2, and u = 2**(f - 24), the most that rounding moves a result near h.
1. m has 15 bits and h has 9, so float32 holds h s. Any other x is a step of float32 or more away, and x / s is off h by
   2/m u at least, or by 4/m u where n m >= 2. Either is more than u, so no rounding takes it to h.
2. Let |r s - 1| = d 2**-24. Then x * r is off x / s by n d u. That leaves more than u if n m < 2 and d <= 1 - m/2, and
   if n m >= 2 and d <= 1/2; h itself, an even number of float32, stays h if n d <= 1, so if d <= 1/2.
"""

import math
from bisect import bisect_left
from functools import cache

import torch

_BITS = 15  # bits of the significand of such a scale: h has 9, and float32 holds products of 24


@cache
def significands() -> list[float]:
    """The significands of such scales, from 1/2 to 1, ascending: whole numbers times 2**-15, 1 among them."""
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
