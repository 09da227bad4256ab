"""The squared error of hidden states: of each token relative to its own size, and of each channel to its share of it.

The norms that read a state divide it by its size, so an error of a tenth costs the model much the same whatever that
size is; and models have tokens, the first of a window above all, whose squares are ten thousand times those of others
("massive activations", arXiv 2402.17762), which would be all that a sum of plain squares sees.

The same holds of channels. After most blocks of Gemma 3 270M one of 640 channels has 0.8 to 0.93 of the squares of a
token, and the median channel a millionth of them to a hundred-thousandth. An error that follows the squares sees that
one channel, and the next block reads all of them, so each channel has the same part in the error.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.system import distributed

TINY = 1e-6  # smallest mean square of a token or channel, as a share of that of all: zeros have no relative error


class Sizes(NamedTuple):
    """The sizes of the hidden states of a text, in relation to which errors are measured."""

    mean_square: float  # mean square of all numbers of the states; 1 if all of them are 0
    channels: Tensor  # [d] float32: weight of the squared error of each channel

    @classmethod
    def of(cls, states: Iterable[Tensor]) -> "Sizes":
        """Measure batches ``[..., d]`` of hidden states; of several processes each has its share of them.

        The weight of a channel is one over its mean square, that of a token relative to the token's size.
        """
        squares, shares, count = torch.zeros(()), torch.zeros(()), 0
        for state in states:
            numbers = state.float().square().flatten(0, -2)
            size = numbers.mean(-1, keepdim=True)
            squares = squares.to(size) + size.sum()
            shares = shares.to(size) + (numbers / size.clamp_min(torch.finfo(torch.float32).tiny)).sum(0)
            count += len(numbers)
        distributed.sum_all([squares, shares])
        number = max(1.0, distributed.summed(count)[0])
        return cls(float(squares) / number or 1.0, (shares / number).clamp_min(TINY).reciprocal())


def relative_squares(found: Tensor, expected: Tensor, sizes: Sizes) -> Tensor:
    """Return ``(found - expected)**2`` ``[..., d]`` relative to the sizes of tokens and channels, in float32.

    A token counts as a share of its own mean of ``expected**2``, and a channel by its weight in ``sizes``, those of all
    states from which ``expected`` comes. Over all these, the mean for a ``found`` of zeros is 1 if
    no token or channel is smaller than ``TINY`` allows.
    """
    expected = expected.float()
    size = expected.square().mean(-1, keepdim=True)
    floor = max(TINY * sizes.mean_square, torch.finfo(torch.float32).tiny)
    # products with what has no gradient save one number a token and one a channel for the backward pass
    return ((found.float() - expected) * size.clamp_min(floor).rsqrt() * sizes.channels.sqrt()).square()
