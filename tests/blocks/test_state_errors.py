"""Squared errors of hidden states, relative to the sizes of tokens and channels."""

import pytest
import torch
from helpers.methods import generator
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.state_errors import TINY, Sizes, relative_squares

EXPECTED = torch.randn(2, 3, 8, generator=generator(0))
FOUND = EXPECTED + 0.1 * torch.randn(2, 3, 8, generator=generator(1))


def relative(found: Tensor, expected: Tensor) -> Tensor:
    return relative_squares(found, expected, Sizes.of([expected]))


def test_tokens_are_relative_to_their_own_size_and_channels_to_their_share_of_it() -> None:
    unit = EXPECTED / EXPECTED.square().mean(-1, keepdim=True).sqrt()
    error = (FOUND - EXPECTED) / EXPECTED.square().mean(-1, keepdim=True).sqrt()
    expected = error.square() / unit.square().flatten(0, 1).mean(0)
    torch.testing.assert_close(relative(FOUND, EXPECTED), expected)


@given(st.lists(st.floats(-1, 2), min_size=6, max_size=6))
def test_a_tokens_size_does_not_matter(powers: list[float]) -> None:
    """The first token of a window can have ten thousand times the squares of the others."""
    size = 10 ** torch.tensor(powers).view(2, 3, 1)
    squares = (EXPECTED * size).square().mean(-1)
    assume(squares.min() > TINY * squares.mean())  # a smaller token counts as a tiny one
    plain, scaled = relative(FOUND, EXPECTED), relative(FOUND * size, EXPECTED * size)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_a_channels_size_does_not_matter(powers: list[float]) -> None:
    """One channel of Gemma 3 has nine tenths of the squares of every token."""
    size = 10 ** torch.tensor(powers)
    expected = EXPECTED.sign()  # its tokens have one size, also in scaled channels
    found = expected + 0.1 * FOUND
    plain, scaled = relative(found, expected), relative(found * size, expected * size)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=14, max_size=14))
def test_every_channel_has_the_same_part_in_the_error_of_zeros(powers: list[float]) -> None:
    size = 10 ** torch.tensor(powers)
    expected = EXPECTED * size[:6].view(2, 3, 1) * size[6:] ** 0.5
    found = relative(torch.zeros_like(expected), expected)
    torch.testing.assert_close(found.flatten(0, 1).mean(0), torch.ones(8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_sizes_do_not_depend_on_batches(size: int) -> None:
    whole, parts = Sizes.of([EXPECTED]), Sizes.of(EXPECTED.split(size))
    assert parts.mean_square == pytest.approx(whole.mean_square, rel=1e-6)
    assert whole.mean_square == pytest.approx(float(EXPECTED.square().mean()), rel=1e-6)
    torch.testing.assert_close(parts.channels, whole.channels)


def test_a_state_of_zeros_counts_as_a_tiny_one() -> None:
    expected = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    found = expected + 1e-4
    sizes = Sizes(4.0, torch.ones(2))
    assert float(relative_squares(found, expected, sizes)[0, 0, 0]) == pytest.approx(1e-8 / (4 * TINY), rel=1e-4)
    assert relative(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_a_channel_of_zeros_counts_as_a_tiny_one() -> None:
    expected = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert Sizes.of([expected]).channels.tolist() == pytest.approx([1 / TINY, 0.5])
    found = relative(expected + torch.tensor([1e-4, 0.0]), expected)
    torch.testing.assert_close(found[:, 0], torch.full((2,), 1e-8 / (2 * TINY)))


def test_squares_beyond_half_precision_are_finite() -> None:
    expected = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert float(relative(expected / 2, expected).mean()) == pytest.approx(0.25)
