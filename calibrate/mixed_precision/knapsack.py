"""Chooses one option (a scheme, or float) for each group of layers so that the sum of errors is least under a limit:
the multiple-choice knapsack problem.

Solved by dynamic programming over the limit (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). A
choice is one option for each group. Costs are counted in whole cells: the difference between the costs of the cheapest
and the most expensive choice is divided into at most CELLS cells. What an option costs more than the cheapest option of
its group is rounded up to whole cells, so the limit is kept in spite of the rounding.

If bytes and time are both limited, price * time is added to the errors. The price is a Lagrange multiplier; a search
finds the lowest price with which the choice keeps both limits. What remains of the limits is then spent greedily, each
time on the option that lowers the error most.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import Cost

CELLS = 1 << 15  # most cells that the range of costs is divided into; memory and time of the search grow with them
_PRICES = 40  # steps of bisection for the price, over a ratio of 1e18
_TINY = 1e-9  # tolerance for the rounding of float sums, as a share of a cell or of the costs


class Option(NamedTuple):
    """Represents one way to treat a group of layers: `scheme`, the name of their scheme (None: the layers stay
    float), `error`, the error of the final latents if only this group is treated so, and `cost`, the cost of the
    group's layers."""

    scheme: str | None
    error: float
    cost: Cost


Groups = Sequence[Sequence[Option]]


def cost_of_choice(groups: Groups, chosen: Sequence[int]) -> Cost:
    """Returns the summed cost of the chosen options; `chosen` has the index of each group's option."""
    whole = Cost()
    for options, index in zip(groups, chosen, strict=True):
        whole = whole.plus(options[index].cost)
    return whole


def lowest_cost(groups: Groups) -> Cost:
    """Returns the smallest bytes and the smallest time of all choices of an option for each of `groups`. The two may
    belong to different choices."""
    return Cost(
        sum(min(option.cost.bytes for option in options) for options in groups),
        sum(min(option.cost.time for option in options) for options in groups),
    )


def choose(groups: Groups, limit: Cost) -> list[int] | None:
    """Returns the index of each group's option so that the sum of errors is least within `limit`, up to the rounding of
    costs to whole cells, the units that costs are counted in. Of choices with equal errors, returns the cheaper.
    Returns None if no choice keeps the limit."""
    limited = [axis for axis, bound in enumerate(limit) if bound != float("inf")]
    first = limited[0] if limited else 0
    errors = [[option.error for option in options] for options in groups]
    costs = [[option.cost[first] for option in options] for options in groups]
    if len(limited) < 2:
        return _choose_within(errors, costs, limit[first])
    others = [[option.cost[1] for option in options] for options in groups]

    def priced(price: float) -> list[int] | None:
        pairs = zip(errors, others, strict=True)
        return _choose_within(
            [[e + price * t for e, t in zip(*pair, strict=True)] for pair in pairs], costs, limit[first]
        )

    return _at_lowest_price(groups, limit, priced)


def _at_lowest_price(groups: Groups, limit: Cost, priced: Callable[[float], list[int] | None]) -> list[int] | None:
    """Returns the choice for the lowest price of time at which the choice keeps both limits, of bytes and time; None if
    there is no such price. `priced(price)` returns the choice with the least sum of errors + price * time. `groups` has
    the options of each group of layers. If the price is above 0, options of this choice are then replaced by options
    with smaller errors, as long as both limits are kept."""
    choice = priced(0.0)
    if choice is None or cost_of_choice(groups, choice).within(limit):
        return choice
    error = sum(max(option.error for option in options) for options in groups) or 1.0
    time = sum(max(option.cost.time for option in options) for options in groups) or 1.0
    low, high = 1e-9 * error / time, 1e9 * error / time
    best: list[int] | None = None
    for _ in range(_PRICES):
        price = (low * high) ** 0.5
        choice = priced(price)
        if choice is not None and cost_of_choice(groups, choice).within(limit):
            best, high = choice, price
        else:
            low = price
    return None if best is None else _spend_rest(groups, best, limit)


def _spend_rest(groups: Groups, chosen: list[int], limit: Cost) -> list[int]:
    """Replaces options in `chosen` by options with smaller errors, while the limits are kept. Each step changes the
    group whose error can fall most. Returns the new choice. `chosen` has the index of each group's option."""
    cost = cost_of_choice(groups, chosen)
    while True:
        gains = [
            (option.error - options[index].error, group, option_index)
            for group, (options, index) in enumerate(zip(groups, chosen, strict=True))
            for option_index, option in enumerate(options)
            if option.error < options[index].error and cost.plus(option.cost.minus(options[index].cost)).within(limit)
        ]
        if not gains:
            return chosen
        _, group, option_index = min(gains)
        chosen = [*chosen[:group], option_index, *chosen[group + 1 :]]
        cost = cost_of_choice(groups, chosen)


def _choose_within(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float
) -> list[int] | None:
    """Returns the index of each group's option so that the sum of errors is least under one limit; None if no choice
    keeps the limit. `errors` and `costs` have, for each group, a number for each of its options."""
    lowest = [min(group) for group in costs]
    available, span = limit - sum(lowest), sum(map(max, costs)) - sum(lowest)
    slack = _TINY * max(span, sum(lowest), 1.0)
    if available < -slack:
        return None
    orders = [sorted(range(len(group)), key=group.__getitem__) for group in costs]
    if available >= span - slack:  # every choice fits, but rounding up to cells could exclude the dearest one
        return [min(order, key=group_errors.__getitem__) for order, group_errors in zip(orders, errors, strict=True)]
    cell = span / CELLS if span > CELLS or span != int(span) else 1.0
    capacity = int(available / cell + _TINY)
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # least error of the groups so far, by cells available
    tables = []
    for order, group_errors, cost, low in zip(orders, errors, costs, lowest, strict=True):
        cells = [-int(-((cost[index] - low) / cell - _TINY) // 1) for index in order]
        best, table = _add_group(best, [group_errors[index] for index in order], cells)
        tables.append((table, cells))
    chosen = []
    for order, (table, cells) in zip(reversed(orders), reversed(tables), strict=True):
        index = int(table[capacity])
        chosen.append(order[index])
        capacity -= max(cells[index], 0)
    return chosen[::-1]


def _add_group(best: Tensor, errors: Sequence[float], cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Adds one group of layers to the dynamic program: returns the least sum of errors for each number of cells (units
    of cost) that all groups so far may spend, and the index of the new group's option that gives this sum. Of equal
    options, the first is used.

    `best` has the least sum of errors of the groups before; `errors` and `cells` have the error and the cost of each
    option of this group, in ascending order of the cost.
    """
    least = torch.full_like(best, float("inf"))
    option_index = torch.zeros(len(best), dtype=torch.uint8)
    for index, (error, count) in enumerate(zip(errors, cells, strict=True)):
        count = max(count, 0)
        if count >= len(best):
            continue
        sums = best[: len(best) - count] + error
        better = sums < least[count:]
        least[count:] = torch.where(better, sums, least[count:])
        option_index[count:][better] = index
    return least, option_index
