"""Which group of linears gets how many bits: the least expected loss within a budget, exactly.

Each group i has a few options, a size s and a cost c each, and one of them is taken:

    minimize  sum c[i, o(i)]     subject to     sum s[i, o(i)] <= budget

the multiple-choice knapsack. It is solved by dynamic programming over the pairs (size, cost) that
the first groups can come to: of two pairs the one that is neither smaller nor cheaper is dropped.
What is left of them is kept small by a bound. With any price p >= 0 of a bit

    best possible from (size, cost) on  >=  cost + sum over the other groups of min (c + p s)
                                                 - p (budget - size)

so that a pair whose bound is above the cost of a choice already known leads nowhere. The price is
the one of the linear relaxation, and the choice known at first is the relaxation's, filled up
greedily: the bound is then off by less than one group's worth, and a few hundred groups take
milliseconds. Nothing is rounded or cut off: the result is an optimum, and the same each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from salience.errors import SalienceError

_SLACK = 1e-9  # of the bound, relative: sums of floats in another order


@dataclass(frozen=True, slots=True)
class Option:
    """One way to code a group: its size in bits and the loss expected of it."""

    size: int
    cost: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The number of the option to take in each group.

    Of choices of the same cost it is one of the smallest size.

    Args:
        groups: the options of each group, at least one.
        budget: the largest sum of sizes.

    Raises:
        SalienceError: the smallest options are together larger than the budget.
    """
    least = [min(option.size for option in group) for group in groups]
    if sum(least) > budget:
        raise SalienceError(f"the smallest choice takes {sum(least)} bits, more than {budget}")
    price = _price(groups, budget)
    known = sum(g[o].cost for g, o in zip(groups, _filled(groups, budget, price), strict=True))
    # Of the groups still to come: the least size, and the least cost at that price.
    rest = numpy.cumsum([0, *reversed(least)])[::-1]
    priced = [min(option.cost + price * option.size for option in group) for group in groups]
    bounds = numpy.cumsum([0.0, *reversed(priced)])[::-1]
    slack = _SLACK * (abs(known) + price * budget + 1e-30)
    sizes, costs = numpy.zeros(1, numpy.int64), numpy.zeros(1)
    steps: list[tuple[numpy.ndarray, numpy.ndarray]] = []
    for i, group in enumerate(groups):
        wide = (sizes[None] + numpy.array([[o.size] for o in group], numpy.int64)).ravel()
        dear = (costs[None] + numpy.array([[o.cost] for o in group])).ravel()
        bound = dear + bounds[i + 1] - price * (budget - wide)
        open_ = numpy.flatnonzero((wide + rest[i + 1] <= budget) & (bound <= known + slack))
        order = open_[numpy.lexsort((dear[open_], wide[open_]))]
        lowest = numpy.minimum.accumulate(dear[order])
        better = numpy.ones(len(order), bool)
        better[1:] = lowest[1:] < lowest[:-1]
        chosen = order[better]
        steps.append((chosen // len(sizes), chosen % len(sizes)))
        sizes, costs = wide[chosen], dear[chosen]
    at = len(costs) - 1  # the last is the cheapest
    result = []
    for options, before in reversed(steps):
        result.append(int(options[at]))
        at = int(before[at])
    return result[::-1]


def _price(groups: Sequence[Sequence[Option]], budget: int) -> float:
    """The price of a bit at which what is best for each group alone just fits the budget."""

    def size(price: float) -> int:
        return sum(groups[i][o].size for i, o in enumerate(_at(groups, price)))

    if size(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while size(high) > budget:
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > budget else (low, middle)
    return high


def _at(groups: Sequence[Sequence[Option]], price: float) -> list[int]:
    """What is best for each group alone when a bit has a price; of equals the smallest."""
    return [
        min(range(len(group)), key=lambda o: (group[o].cost + price * group[o].size, group[o].size))
        for group in groups
    ]


def _filled(groups: Sequence[Sequence[Option]], budget: int, price: float) -> list[int]:
    """That choice, with what still fits: the largest gain of a bit first."""
    choice = _at(groups, price)
    left = budget - sum(group[o].size for group, o in zip(groups, choice, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for i, group in enumerate(groups):
            now = group[choice[i]]
            for o, option in enumerate(group):
                more, gain = option.size - now.size, now.cost - option.cost
                if gain > 0 and more <= left:
                    rate = gain / max(more, 1e-9)
                    best = max(best, (rate, i, o)) if best else (rate, i, o)
        if best is None:
            return choice
        _, i, o = best
        left -= groups[i][o].size - groups[i][choice[i]].size
        choice[i] = o
