"""Picks the calls that the SQNR of a calibration is measured on, from all noise levels and prompts.

The calls are sorted by noise level and cut into as many strata of equal size as calls are wanted. One call is picked
from each stratum (stratified sampling: Cochran, Sampling Techniques, 1977, chapter 5): a call whose prompt was picked
least often so far. Three picks of a held-out prompt count as one pick, so that about half of the picked calls are held
out. Among calls that do not name their prompt, held-out calls are picked first.
"""

from collections import Counter
from collections.abc import Sequence

from .current_call import CurrentCall

# default number of measured calls. For 97 % of the tiny denoisers of tests/zoo, with 32 calls each, the SQNR over 16 of
# the calls is within 1 dB of the SQNR over all; over 8 of the calls, for 90 % (bench/bench_sqnr.py)
MEASURED = 16
# how often a held-out prompt is picked for each time that another is: a quarter is held out, three quarters are not, so
# that both kinds get about half of the calls
_HELD_OUT_WEIGHT = 3
_GOLDEN = 0.6180339887498949  # golden ratio: its multiples are not periodic, so they match no period of the calls


def measured_calls(current: CurrentCall, wanted: int) -> list[int]:
    """Returns the positions of the `wanted` calls to measure, in ascending order; all positions if there are no more
    than `wanted` calls. `current` has the noise levels and prompts of all calls, as it is at the end of a replay."""
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
            times = 0.0 if unit is None else used[unit] / (1 if is_training else _HELD_OUT_WEIGHT)
            return times, is_training, abs(index + 0.5 - middle)

        position = order[min(range(start, end), key=rank)]
        used[current.units[position]] += 1
        positions.append(position)
    return sorted(positions)


def _ordered(current: CurrentCall) -> Sequence[int]:
    """Returns the positions of all calls by descending noise level. If a call has no noise level, orders all calls by
    their position within their prompt instead. `current` has the noise levels and prompt numbers of the calls."""
    if len(current.levels) == current.count:
        return sorted(current.levels, key=lambda position: (-current.levels[position], position))
    places, counts = [], Counter[int]()
    for position, unit in enumerate(current.units):
        places.append(position if unit is None else counts[unit])
        counts[-1 if unit is None else unit] += 1
    return sorted(range(current.count), key=lambda position: (places[position], position))
