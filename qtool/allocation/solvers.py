"""Solvers of the multiple-choice knapsack problem: one choice per item, within a total size and at the least cost.

An item has a size (an integer: bits, bytes) and a cost for each of its choices. Sizes rise from choice to choice; costs
are measured, so they usually fall, but need not. Every solver returns the index of each item's choice. The total size
of the choices never exceeds ``capacity``, which must be enough for the smallest choices.
"""

from collections.abc import Callable, Sequence

import numpy as np

Sizes = Sequence[Sequence[int]]
Costs = Sequence[Sequence[float]]
SLACK = 1e-9  # tolerance of sums of costs, as a share of the largest sum: their order of terms may differ


def total(table: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    """Return the sum of the chosen entries of ``table``."""
    return sum(row[index] for row, index in zip(table, chosen, strict=True))


def hull_steps(sizes: Sequence[int], costs: Sequence[float]) -> list[tuple[float, int]]:
    """Return the corners of an item's lower convex hull after its smallest choice: cost saved per size, and index."""
    steps: list[tuple[float, int]] = []
    here = 0
    while True:
        falls = [((costs[here] - costs[i]) / (sizes[i] - sizes[here]), i) for i in range(here + 1, len(sizes))]
        fall, index = max(falls, default=(0.0, here))  # the largest index among equals: no corner lies between them
        if fall <= 0:
            return steps
        steps.append((fall, index))
        here = index


def lagrangian(sizes: Sizes, costs: Costs, capacity: int) -> list[int]:
    """Return ``argmin cost + price * size`` of each item, with the lowest price of size whose choices fit.

    As the price falls, items step along the corners of their convex hulls, the steepest step first; the search ends at
    the first step that does not fit.
    """
    steps = [
        (fall, item, index)
        for item, (size, cost) in enumerate(zip(sizes, costs, strict=True))
        for fall, index in hull_steps(size, cost)
    ]
    chosen = [0] * len(sizes)
    used = int(total(sizes, chosen))
    # an item's own steps stay in order, because slopes on a hull decrease
    for _, item, index in sorted(steps, key=lambda step: -step[0]):
        used += sizes[item][index] - sizes[item][chosen[item]]
        if used > capacity:
            break
        chosen[item] = index
    return chosen


def greedy(sizes: Sizes, costs: Costs, capacity: int, start: Sequence[int] | None = None) -> list[int]:
    """Start from the smallest choices (or ``start``), and repeat the step that fits and saves most cost per size."""
    chosen = list(start) if start is not None else [0] * len(sizes)
    room = capacity - int(total(sizes, chosen))
    while True:
        best, at = 0.0, None
        for item, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            here = chosen[item]
            for index in range(here + 1, len(size)):
                more = size[index] - size[here]
                if more <= room and (cost[here] - cost[index]) / more > best:
                    best, at = (cost[here] - cost[index]) / more, (item, index)
        if at is None:
            return chosen
        item, index = at
        room -= sizes[item][index] - sizes[item][chosen[item]]
        chosen[item] = index


def exact(sizes: Sizes, costs: Costs, capacity: int) -> list[int]:
    """Return the optimum, by dynamic programming over the items.

    After each item only those partial sums are kept that no other beats in both size and cost, and that can still lead
    to a lower cost than a known solution: with the price of size of the Lagrangian, ``cost + price * size`` bounds the
    cost of the remaining items from below. Sizes share large factors, so the sums are few: at most ``capacity`` divided
    by their greatest common divisor.
    """
    known = greedy(sizes, costs, capacity, lagrangian(sizes, costs, capacity))
    most = total(costs, known) + SLACK * sum(max(map(abs, cost)) for cost in costs)
    price = _price(sizes, costs, capacity)
    smallest_rest, bound_rest = [0], [0.0]  # sums over the items after each item, from the last backwards
    for size, cost in zip(reversed(sizes), reversed(costs), strict=True):
        smallest_rest.append(smallest_rest[-1] + size[0])
        bound_rest.append(bound_rest[-1] + min(c + price * s for s, c in zip(size, cost, strict=True)))
    used, spent = np.zeros(1, np.int64), np.zeros(1)
    history = []
    for left, (size, cost) in zip(range(len(sizes) - 1, -1, -1), zip(sizes, costs, strict=True), strict=True):
        used = (used[:, None] + np.asarray(size, np.int64)).ravel()
        spent = (spent[:, None] + np.asarray(cost, np.float64)).ravel()
        fits = used + smallest_rest[left] <= capacity
        index = np.flatnonzero(fits & (spent + bound_rest[left] - price * (capacity - used) <= most))
        index = index[np.lexsort((spent[index], used[index]))]
        lowest = np.minimum.accumulate(spent[index])
        index = index[np.concatenate(([True], spent[index][1:] < lowest[:-1]))]
        used, spent = used[index], spent[index]
        history.append(index)
    chosen, at = [], len(spent) - 1  # the last state has the lowest cost, since costs fall from state to state
    for size, index in zip(reversed(sizes), reversed(history), strict=True):
        at, choice = divmod(int(index[at]), len(size))
        chosen.append(choice)
    return chosen[::-1]


def _price(sizes: Sizes, costs: Costs, capacity: int) -> float:
    """Return the price of size at which the choices of ``lagrangian`` exceed ``capacity``; 0 if none exceed it."""
    steps = [
        (fall, size[index] - size[before])
        for size, cost in zip(sizes, costs, strict=True)
        for before, (fall, index) in _from(hull_steps(size, cost))
    ]
    room = capacity - sum(size[0] for size in sizes)
    for fall, more in sorted(steps, reverse=True):
        room -= more
        if room < 0:
            return fall
    return 0.0


def _from(steps: list[tuple[float, int]]) -> list[tuple[int, tuple[float, int]]]:
    """Pair each step with the index that it starts from."""
    return list(zip([0, *(index for _, index in steps)], steps, strict=False))


SOLVERS: dict[str, Callable[[Sizes, Costs, int], list[int]]] = {
    "dp": exact,
    "lagrangian": lagrangian,
    "greedy": greedy,
}
