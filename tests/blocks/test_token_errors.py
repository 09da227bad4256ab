"""Squared errors of hidden states, relative to the size of each token."""

import pytest
import torch
from helpers.methods import generator
from hypothesis import given
from hypothesis import strategies as st

from qtool.blocks.token_errors import TINY, relative_squares

EXPECTED = torch.randn(2, 3, 8, generator=generator(0))
FOUND = EXPECTED + 0.1 * torch.randn(2, 3, 8, generator=generator(1))


def test_the_mean_is_that_of_the_relative_errors_of_tokens() -> None:
    shares = [
        float((FOUND[n, t] - EXPECTED[n, t]).norm() ** 2 / EXPECTED[n, t].norm() ** 2)
        for n in range(2)
        for t in range(3)
    ]
    assert float(relative_squares(FOUND, EXPECTED).mean()) == pytest.approx(sum(shares) / 6, rel=1e-5)


@given(st.lists(st.floats(-1, 2), min_size=6, max_size=6))
def test_a_tokens_size_does_not_matter(powers: list[float]) -> None:
    """The first token of a window can have ten thousand times the squares of the others."""
    size = 10 ** torch.tensor(powers).view(2, 3, 1)
    plain, scaled = relative_squares(FOUND, EXPECTED), relative_squares(FOUND * size, EXPECTED * size)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-6)


def test_a_state_of_zeros_counts_as_a_tiny_one() -> None:
    expected = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    found = expected + 1e-4
    assert float(relative_squares(found, expected, 4.0)[0, 0, 0]) == pytest.approx(1e-8 / (4 * TINY), rel=1e-4)
    assert relative_squares(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_squares_beyond_half_precision_are_finite() -> None:
    expected = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert float(relative_squares(expected / 2, expected).mean()) == pytest.approx(0.25)
