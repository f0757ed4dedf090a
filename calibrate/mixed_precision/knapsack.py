"""Chooses one option for each group with the least error under a limit: the multiple-choice knapsack problem.

Solved by dynamic programming over the limit (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). The
costs above each group's cheapest option are rounded up to cells, so the limit is kept whatever the rounding. A second
limit becomes a price that is added to the errors (Lagrange): the lowest price that keeps it. The rest of both limits is
spent greedily.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.inputs import Input
from .budget import Cost

CELLS = 1 << 15  # most cells that the range of costs is divided into: they bound memory and time of the search
_PRICES = 40  # steps of bisection for the price, over a ratio of 1e18
_TINY = 1e-9  # tolerance for the rounding of float sums, as a share of a cell or of the costs


class Option(NamedTuple):
    """One way to treat a group: how inputs become codes (`kind`, None: float), the error and the cost of that."""

    kind: type[Input] | None
    error: float
    cost: Cost


Groups = Sequence[Sequence[Option]]


def total(groups: Groups, chosen: Sequence[int]) -> Cost:
    """The cost of a choice."""
    whole = Cost()
    for options, at in zip(groups, chosen, strict=True):
        whole = whole.plus(options[at].cost)
    return whole


def least(groups: Groups) -> Cost:
    """The smallest possible bytes and the smallest possible time; no single choice need have both."""
    return Cost(
        sum(min(option.cost.bytes for option in options) for options in groups),
        sum(min(option.cost.time for option in options) for options in groups),
    )


def choose(groups: Groups, limit: Cost) -> list[int] | None:
    """The index of each group's option: the least sum of errors within `limit`, up to the size of a cell; of equal
    choices the cheaper. None where no choice keeps the limit."""
    limited = [at for at, most in enumerate(limit) if most != float("inf")]
    axis = limited[0] if limited else 0
    errors = [[option.error for option in options] for options in groups]
    costs = [[option.cost[axis] for option in options] for options in groups]
    if len(limited) < 2:
        return _one(errors, costs, limit[axis])
    others = [[option.cost[1] for option in options] for options in groups]

    def priced(price: float) -> list[int] | None:
        pairs = zip(errors, others, strict=True)
        return _one([[e + price * t for e, t in zip(*pair, strict=True)] for pair in pairs], costs, limit[axis])

    return _cheapest_price(groups, limit, priced)


def _cheapest_price(groups: Groups, limit: Cost, priced: Callable[[float], list[int] | None]) -> list[int] | None:
    """The choice at the lowest price of time that keeps both limits."""
    found = priced(0.0)
    if found is None or total(groups, found).within(limit):
        return found
    error = sum(max(option.error for option in options) for options in groups) or 1.0
    time = sum(max(option.cost.time for option in options) for options in groups) or 1.0
    low, high = 1e-9 * error / time, 1e9 * error / time
    best: list[int] | None = None
    for _ in range(_PRICES):
        price = (low * high) ** 0.5
        found = priced(price)
        if found is not None and total(groups, found).within(limit):
            best, high = found, price
        else:
            low = price
    return None if best is None else _filled(groups, best, limit)


def _filled(groups: Groups, chosen: list[int], limit: Cost) -> list[int]:
    """Spends the rest of the limits on better options: one group after the other, the largest gain first."""
    now = total(groups, chosen)
    while True:
        gains = [
            (option.error - options[own].error, at, to)
            for at, (options, own) in enumerate(zip(groups, chosen, strict=True))
            for to, option in enumerate(options)
            if option.error < options[own].error and now.plus(option.cost.minus(options[own].cost)).within(limit)
        ]
        if not gains:
            return chosen
        _, at, to = min(gains)
        chosen = [*chosen[:at], to, *chosen[at + 1 :]]
        now = total(groups, chosen)


def _one(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """The choice with the least sum of errors under one limit."""
    lowest = [min(each) for each in costs]
    room, span = limit - sum(lowest), sum(map(max, costs)) - sum(lowest)
    slack = _TINY * max(span, sum(lowest), 1.0)
    if room < -slack:
        return None
    orders = [sorted(range(len(each)), key=each.__getitem__) for each in costs]
    if room >= span - slack:  # rounding up to cells could still forbid the dearest of all groups together
        return [min(order, key=own.__getitem__) for order, own in zip(orders, errors, strict=True)]
    cell = span / CELLS if span > CELLS or span != int(span) else 1.0
    capacity = int(room / cell + _TINY)
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # least error of the groups so far, by cells available
    taken = []
    for order, own, cost, low in zip(orders, errors, costs, lowest, strict=True):
        cells = [-int(-((cost[at] - low) / cell - _TINY) // 1) for at in order]
        best, which = _added(best, [own[at] for at in order], cells)
        taken.append((which, cells))
    chosen = []
    for order, (which, cells) in zip(reversed(orders), reversed(taken), strict=True):
        at = int(which[capacity])
        chosen.append(order[at])
        capacity -= max(cells[at], 0)
    return chosen[::-1]


def _added(best: Tensor, errors: Sequence[float], cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The least errors with one more group, by cells, and the option of that group which gives them; the first of
    equal ones."""
    made = torch.full_like(best, float("inf"))
    which = torch.zeros(len(best), dtype=torch.uint8)
    for at, (error, count) in enumerate(zip(errors, cells, strict=True)):
        count = max(count, 0)
        if count >= len(best):
            continue
        sums = best[: len(best) - count] + error
        better = sums < made[count:]
        made[count:] = torch.where(better, sums, made[count:])
        which[count:][better] = at
    return made, which
