"""The solvers: against trying everything, against the closed form, and on the shapes of a large model."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qtool.allocation import solvers
from qtool.allocation.solvers import SOLVERS, exact, total

WIDTHS = (2, 3, 4, 8)


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Up to five items; costs need not fall, and may be equal."""
    sizes, costs = [], []
    for _ in range(draw(st.integers(1, 5))):
        sizes.append(sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=4))))
        number = st.floats(0, 4) | st.integers(0, 3).map(float)
        costs.append(draw(st.lists(number, min_size=len(sizes[-1]), max_size=len(sizes[-1]))))
    return sizes, costs, sum(size[0] for size in sizes) + draw(st.integers(0, 60))


def cheapest(sizes: list[list[int]], costs: list[list[float]], capacity: float) -> float:
    """Return the lowest cost, found by trying every choice."""
    every = itertools.product(*(range(len(size)) for size in sizes))
    return min(total(costs, chosen) for chosen in every if total(sizes, chosen) <= capacity)


@given(instances())
def test_dp_finds_what_trying_everything_finds(instance: tuple[list[list[int]], list[list[float]], int]) -> None:
    sizes, costs, capacity = instance
    assert total(costs, exact(sizes, costs, capacity)) == pytest.approx(cheapest(*instance), abs=1e-7)


@given(instances(), st.sampled_from(sorted(SOLVERS)))
def test_no_solver_exceeds_the_budget_or_makes_the_smallest_choice_worse(
    instance: tuple[list[list[int]], list[list[float]], int], solver: str
) -> None:
    sizes, costs, capacity = instance
    chosen = SOLVERS[solver](*instance)
    assert total(sizes, chosen) <= capacity
    assert total(costs, chosen) <= total(costs, [0] * len(sizes)) + 1e-9


@given(instances(), st.integers(0, 20), st.sampled_from(["dp", "lagrangian"]))
def test_more_budget_never_costs_more(
    instance: tuple[list[list[int]], list[list[float]], int], more: int, solver: str
) -> None:
    sizes, costs, capacity = instance
    before, after = (total(costs, SOLVERS[solver](sizes, costs, c)) for c in (capacity, capacity + more))
    assert after <= before + 1e-7


@given(instances())
def test_lagrangian_is_optimal_for_the_size_that_it_uses(
    instance: tuple[list[list[int]], list[list[float]], int],
) -> None:
    sizes, costs, _ = instance
    chosen = solvers.lagrangian(*instance)
    assert total(costs, chosen) <= cheapest(sizes, costs, total(sizes, chosen)) + 1e-7


@pytest.mark.parametrize("solver", ["dp", "lagrangian"])
def test_the_worked_example_of_the_closed_form(solver: str) -> None:
    """``b_l = mean + log2(a_l s_l) / 2 - ...`` for errors ``a s 4**-b``: 6.1, 5.1, 4.1 and 3.1 bits."""
    weights, sensitivity = (100, 100, 400, 400), (4 * 1.0, 1 * 1.0, 1 * 0.25, 0.25 * 0.25)
    mean = sum(n * math.log2(a) for n, a in zip(weights, sensitivity, strict=True)) / sum(weights)
    expected = [4 + math.log2(a) / 2 - mean / 2 for a in sensitivity]
    assert expected == pytest.approx([6.1, 5.1, 4.1, 3.1])
    tenths = range(11, 82)
    sizes = [[n * bits for bits in tenths] for n in weights]
    costs = [[n * a * 4 ** (-bits / 10) for bits in tenths] for n, a in zip(weights, sensitivity, strict=True)]
    chosen = SOLVERS[solver](sizes, costs, 40 * sum(weights))
    assert [tenths[index] / 10 for index in chosen] == pytest.approx(expected)


@pytest.mark.parametrize("odd", [0, 1])
def test_dp_is_exact_on_the_shapes_of_a_large_model(odd: int) -> None:
    """Against a plain dynamic program over every reachable size; with odd sizes, which share no factor, the bound."""
    shapes = [3 * 4096 * 4096 + odd, 4096 * 4096 + 3 * odd, 2 * 4096 * 11008 + 7 * odd, 4096 * 11008 + 5 * odd]
    generator = torch.Generator().manual_seed(0)
    sizes = [[n * bits for bits in WIDTHS] for _ in range(32) for n in shapes]
    costs = [[float(a) * 4.0**-bits for bits in WIDTHS] for a in torch.randn(128, generator=generator).exp()]
    capacity = 3 * 32 * sum(shapes)
    chosen = exact(sizes, costs, capacity)
    assert total(sizes, chosen) <= capacity
    lower = solvers.lagrangian(sizes, costs, capacity)
    assert total(costs, chosen) <= total(costs, solvers.greedy(sizes, costs, capacity, lower))
    if not odd:
        assert total(costs, chosen) == pytest.approx(dense_optimum(sizes, costs, capacity), rel=1e-9)


def dense_optimum(sizes: list[list[int]], costs: list[list[float]], capacity: int) -> float:
    """One number for each size there may be, in units of the common divisor."""
    unit = math.gcd(*(n for size in sizes for n in size))
    room = capacity // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    for size, cost in zip(sizes, costs, strict=True):
        options = [
            F.pad(best[: room + 1 - n // unit], (n // unit, 0), value=torch.inf) + c
            for n, c in zip(size, cost, strict=True)
        ]
        best = torch.stack(options).amin(0)
    return float(best.min())
