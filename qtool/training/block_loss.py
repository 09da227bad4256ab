"""The loss of training one block: the distance of its output from the float block's, on calibration windows.

It is a sum over tokens and channels and not a mean, so that half-precision gradients do not underflow, as a share of
the mean square of the float block's output, so that learning rates suit every block. Every method that trains a block
takes its loss from here.
"""

from collections.abc import Sequence

from torch import Tensor

from qtool.blocks.hidden_states import HiddenStates, joined


class Windows(Sequence[Tensor]):
    """The windows of hidden states: ``windows[indices]`` is ``[b, t, d]``."""

    def __init__(self, hidden: HiddenStates) -> None:
        """Number the windows of all batches of ``hidden`` through."""
        self.hidden = hidden
        self.places = [(i, j) for i, batch in enumerate(hidden) for j in range(batch.shape[0])]

    def __len__(self) -> int:
        return len(self.places)

    def of_batch(self, index: int) -> list[int]:
        """Return the windows of the batch ``index``."""
        return [window for window, (batch, _) in enumerate(self.places) if batch == index]

    def __getitem__(self, indices: Sequence[int]) -> Tensor:  # type: ignore[override]
        rows = [self.hidden[i][j : j + 1] for i, j in (self.places[index] for index in indices)]
        return joined(rows)


class BlockLoss:
    """The squared difference of the outputs of a block from those of the float block, ``goal``."""

    def __init__(self, goal: HiddenStates, outliers: float = 0.0, weights: tuple[Tensor, Tensor] | None = None) -> None:
        """Train towards ``goal``, the float block's output for each batch of the calibration text.

        The share ``outliers`` of the differences, the largest ones, is left out of the sum. ``weights`` of tokens
        ``[n, t]``, of all windows, and of channels ``[d]`` multiply the squares; their means are 1 (``guided.py``).
        """
        self.goal, self.outliers, self.weights = Windows(goal), outliers, weights
        squares = [float(batch.float().square().mean()) for batch in goal]
        self.mean_square = sum(squares) / max(1, len(squares)) or 1.0

    def summed(self, indices: Sequence[int], outputs: Tensor) -> Tensor:
        """Return the loss of ``outputs`` ``[b, t, d]``, the block's outputs of the windows ``indices``, in float32."""
        difference = outputs.float() - self.goal[indices].float()
        dropped = round(self.outliers * difference.numel())
        if dropped:
            size = difference.detach().abs()
            difference = difference.masked_fill(size >= size.flatten().topk(dropped).values[-1], 0)
        squares = difference.square()
        if self.weights is not None:
            tokens, channels = (each.to(squares.device) for each in self.weights)
            squares = squares * tokens[list(indices)].unsqueeze(-1) * channels
        return squares.sum() / self.mean_square

    def count(self, indices: Sequence[int]) -> int:
        """Return the number of terms in the sum over the windows ``indices``; the sum divided by it is the mean."""
        return self.goal[indices].numel()
