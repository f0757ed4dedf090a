"""Decides whether a comparison meets the limits that its user set. What meets or misses a limit is either the estimate
of a measure or a bound of its 95 % interval."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from .intervals import more_groups, more_groups_of_share


class Limit(NamedTuple):
    """A limit that a measure has to meet: `bar`, the lowest value allowed, or the highest if `at_most`. `option` names
    the command line option that sets it; `keys` are the keys of the measure in a comparison's totals, in the order of
    preference: the first that was measured decides."""

    option: str
    bar: float
    keys: Sequence[str]
    at_most: bool = False


def meets(value: float, bar: float, at_most: bool) -> bool:
    """Returns whether `value` is allowed: `bar` is the highest allowed value if `at_most`, otherwise the lowest."""
    return value <= bar if at_most else value >= bar


def judged_gates(
    limits: Sequence[Limit], totals: Mapping[str, Any], by: str, samples: int, pairs: int
) -> list[dict[str, Any]]:
    """Returns for each of `limits` whether `totals` (`Side.totals`) meets it, as JSON-able values:

    | key       | value                                                                                             |
    |-----------|---------------------------------------------------------------------------------------------------|
    | key       | the measure, a key of `totals`                                                                    |
    | value     | the estimate; null: no difference, or not measured (`measured` is false)                          |
    | interval  | its 95 % interval, null for one pair                                                              |
    | bar       | the limit                                                                                         |
    | at_most   | whether the limit is the highest value allowed                                                    |
    | by        | what decided: worst, estimate or best                                                             |
    | passed    | whether the limit is met                                                                          |
    | settled   | whether the whole interval is on one side of the limit                                            |
    | more      | an estimate of how many more pairs would settle it; null: unknown                                 |

    `by` chooses what decides: "worst", the bound of the interval that is nearer to missing the limit, "estimate", or
    "best", the other bound. Without an interval the estimate decides. `samples` is the number of independent samples
    (`Side.samples`) among the `pairs`.
    """
    gates = [_judged_gate(limit, totals, by, samples) for limit in limits]
    return [gate | {"more": gate["more"] and math.ceil(gate["more"] * pairs / samples)} for gate in gates]


def _judged_gate(limit: Limit, totals: Mapping[str, Any], by: str, samples: int) -> dict[str, Any]:
    key = next((key for key in limit.keys if totals[key] is not None), limit.keys[-1])
    value, bounds = value_of(totals, key), totals["intervals"].get(key)
    same = key == "psnr" or (key == "output_sqnr" and totals["output_same"])  # if there is no value
    gate = {
        "key": key, "option": limit.option, "value": value, "interval": bounds, "bar": limit.bar,
        "at_most": limit.at_most, "by": by if bounds else "estimate", "measured": value is not None or same,
    }  # fmt: skip
    if not gate["measured"]:
        return gate | {"passed": False, "settled": False, "more": None}
    # no difference, None, is better than any number
    low, high, middle = (math.inf if number is None else number for number in (*(bounds or (value, value)), value))
    worst, best = (high, low) if limit.at_most else (low, high)
    met = partial(meets, bar=limit.bar, at_most=limit.at_most)
    settled = bounds is not None and met(worst) == met(best)
    more: int | None = 0
    if not settled:
        bound = worst if met(middle) else best
        known = bounds is not None and math.isfinite(middle) and math.isfinite(bound)
        more = _more(key, middle, bound, limit.bar, samples) if known else None
    decider = {"worst": worst, "best": best}.get(gate["by"], middle)
    return gate | {"passed": met(decider), "settled": settled, "more": more}


def _more(key: str, value: float, bound: float, bar: float, samples: int) -> int | None:
    return more_groups_of_share(value, bar, samples) if key == "judged" else more_groups(value, bound, bar, samples)


def value_of(totals: Mapping[str, Any], key: str) -> float | None:
    """Returns the estimate of the measure `key` in `totals`, None if it has no value. For the key `judged`, the
    estimate is the share of quantized pictures that show what their prompt describes, 0 to 1."""
    value = totals[key]
    if key == "judged" and value:
        return float(value["quantized"] / value["of"])
    return value if value is None else float(value)
