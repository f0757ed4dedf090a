"""Picks the calls that the SQNR of a calibration is measured on: spread over noise levels and prompts.

The calls are put in order of their noise level and cut into as many strata of equal size as calls are wanted; one call
is taken from each (stratified sampling: Cochran, Sampling Techniques, 1977, chapter 5). Within a stratum the prompts
take turns, a held-out prompt up to three times as often as another. Calls that do not name their prompt are taken
held-out ones first.
"""

from collections import Counter
from collections.abc import Sequence

from .current_call import CurrentCall

# calls, where settings name no other number: for 97 % of the tiny denoisers of tests/zoo, 32 calls each, the SQNR over
# 16 of them is within 1 dB of that over all; over 8 of them for 90 % (bench/bench_sqnr.py)
MEASURED = 16
_TURNS = 3  # turns of a held-out prompt for one of another prompt: a quarter is held out, three quarters are not
_GOLDEN = 0.6180339887498949  # multiples of the golden ratio fall in step with no period of the calls


def measured_calls(current: CurrentCall, wanted: int) -> list[int]:
    """The positions of `wanted` of the calls that `current` saw, ascending; all where there are no more."""
    count = current.count
    if wanted >= count:
        return list(range(count))
    order, training = _ordered(current), set(current.training)
    positions, used = list[int](), Counter[int | None]()
    for stratum in range(wanted):
        start, end = stratum * count // wanted, (stratum + 1) * count // wanted
        middle = start + (stratum + 0.5) * _GOLDEN % 1.0 * (end - start)

        def rank(index: int, middle: float = middle) -> tuple[float, bool, float]:
            unit, is_training = current.units[order[index]], order[index] in training
            times = 0.0 if unit is None else used[unit] / (1 if is_training else _TURNS)
            return times, is_training, abs(index + 0.5 - middle)

        position = order[min(range(start, end), key=rank)]
        used[current.units[position]] += 1
        positions.append(position)
    return sorted(positions)


def _ordered(current: CurrentCall) -> Sequence[int]:
    """The positions of all calls by descending noise level; without levels by the place in their prompt."""
    if len(current.levels) == current.count:
        return sorted(current.levels, key=lambda position: (-current.levels[position], position))
    places, counts = [], Counter[int]()
    for position, unit in enumerate(current.units):
        places.append(position if unit is None else counts[unit])
        counts[-1 if unit is None else unit] += 1
    return sorted(range(current.count), key=lambda position: (places[position], position))
