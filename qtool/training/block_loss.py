"""The loss of training one block: the distance of its output from the float block's, on calibration windows.

It is a sum over tokens and channels and not a mean, so that half-precision gradients do not underflow, as a share of
the mean square of the float block's output, so that learning rates suit every block. Every method that trains a block
takes its loss from here.
"""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from qtool.blocks.hidden_states import HiddenStates, joined
from qtool.system import distributed


class Windows(Sequence[Tensor]):
    """The windows of hidden states: ``windows[indices]`` is ``[b, t, d]``.

    They are numbered through over the whole text, of which one of several processes holds a share.
    """

    def __init__(self, hidden: HiddenStates) -> None:
        """Number the windows of all batches of the text whose hidden states are ``hidden``."""
        self.hidden, share = hidden, hidden.share
        starts = [0, *accumulate(share.sizes)]
        self.num_windows = starts[-1]
        self.places = {
            starts[number] + j: (i, j) for i, number in enumerate(share.numbers) for j in range(share.sizes[number])
        }

    def __len__(self) -> int:
        return self.num_windows

    def held(self, indices: Sequence[int]) -> list[int]:
        """Return those of ``indices`` that this process holds."""
        return [window for window in indices if window in self.places]

    def of_batch(self, index: int) -> list[int]:
        """Return the windows of the batch ``index`` among those that this process holds."""
        return [window for window, (batch, _) in self.places.items() if batch == index]

    def __getitem__(self, indices: Sequence[int]) -> Tensor:  # type: ignore[override]
        rows = [self.hidden[i][j : j + 1] for i, j in (self.places[index] for index in indices)]
        return joined(rows)


class BlockLoss:
    """The squared difference of the outputs of a block from those of the float block, ``goal``."""

    def __init__(self, goal: HiddenStates, outliers: float = 0.0) -> None:
        """Train towards ``goal``, the float block's output for each batch of the calibration text.

        The share ``outliers`` of the differences, the largest ones, is left out of the sum.
        """
        self.goal, self.outliers = Windows(goal), outliers
        squares = sum(len(batch) * float(batch.float().square().mean()) for batch in goal)
        total, count = distributed.summed(squares, sum(len(batch) for batch in goal))
        self.mean_square = total / max(1, count) or 1.0

    def summed(self, indices: Sequence[int], outputs: Tensor) -> Tensor:
        """Return the loss of ``outputs`` ``[b, t, d]``, the block's outputs of the windows ``indices``, in float32."""
        difference = outputs.float() - self.goal[indices].float()
        dropped = round(self.outliers * difference.numel())
        if dropped:
            size = difference.detach().abs()
            difference = difference.masked_fill(size >= size.flatten().topk(dropped).values[-1], 0)
        return difference.square().sum() / self.mean_square

    def count(self, indices: Sequence[int]) -> int:
        """Return the number of terms in the sum over the windows ``indices``; the sum divided by it is the mean."""
        return self.goal[indices].numel()
