"""The loss of training one block: the distance of its output from the float block's, on calibration windows.

Each token counts by its error relative to its own size, and each channel relative to its share of that
(``blocks/state_errors.py``). The loss is a sum over tokens and channels and not a mean, so that half-precision
gradients do not underflow. Every method that trains a block takes its loss from here.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qtool.blocks.ending import Ending
from qtool.blocks.hidden_states import HiddenStates, joined
from qtool.blocks.state_errors import Sizes, relative_squares
from qtool.blocks.task import BlockTask
from qtool.training.losses import kl
from qtool.training.sliced import slices_of, summed


class Windows(Sequence[Tensor]):
    """The windows of hidden states: ``windows[indices]`` is ``[b, t, d]``.

    They are numbered through over the whole text, of which one of several processes holds a share.
    """

    def __init__(self, hidden: HiddenStates) -> None:
        """Number the windows of all batches of the text whose hidden states are ``hidden``."""
        self.hidden = hidden
        self.num_windows = sum(hidden.share.sizes)
        self.places = {window: (i, j) for i, batch in enumerate(hidden.share.windows) for j, window in enumerate(batch)}

    def __len__(self) -> int:
        return self.num_windows

    def held(self, indices: Sequence[int]) -> list[int]:
        """Return those of ``indices`` that this process holds."""
        return [window for window in indices if window in self.places]

    def parts(self, indices: Sequence[int], sizes: Iterable[int]) -> Iterator[list[int]]:
        """Split those of ``indices`` that this process holds into parts of the largest of ``sizes``, one of them 1."""
        left, descending = self.held(indices), sorted(sizes, reverse=True)
        while left:
            size = next(size for size in descending if size <= len(left))
            yield left[:size]
            left = left[size:]

    def shapes(self, indices: Sequence[int]) -> list[torch.Size]:
        """Return the shape ``[t, d]`` of each window; hidden states on disk are not read."""
        return [self.hidden.window_shape(self.places[index][0]) for index in indices]

    def __getitem__(self, indices: Sequence[int]) -> Tensor:  # type: ignore[override]
        rows = [self.hidden[i][j : j + 1] for i, j in (self.places[index] for index in indices)]
        return joined(rows)


class BlockLoss:
    """The squared relative difference of the outputs of a block from those of the float block, ``goal``."""

    def __init__(
        self,
        goal: HiddenStates,
        outliers: float = 0.0,
        weights: tuple[Tensor, Tensor] | None = None,
        plain: bool = False,
    ) -> None:
        """Train towards ``goal``, the float block's output for each batch of the calibration text.

        The share ``outliers`` of the differences, the largest ones, is left out of the sum. ``weights`` of tokens
        ``[n, t]``, of all windows, and of channels ``[d]`` multiply the plain squares, as a share of the mean square
        of the whole goal: gradients know what a token's error costs (``guided.py``). Their means are 1. With
        ``plain`` the squares have no weights: those of rows that stand for the tokens of a text in the sum alone.
        """
        self.goal, self.outliers, self.weights = Windows(goal), outliers, weights
        self.relative = weights is None and not plain
        self.sizes = Sizes.of(goal)

    def summed(self, indices: Sequence[int], outputs: Tensor) -> Tensor:
        """Return the loss of ``outputs`` ``[b, t, d]``, the block's outputs of the windows ``indices``, in float32."""
        goal = self.goal[indices]
        if self.relative:
            squares = relative_squares(outputs, goal, self.sizes)
        else:
            squares = (outputs.float() - goal.float()).square() / self.sizes.mean_square
        dropped = round(self.outliers * squares.numel())
        if dropped:
            size = squares.detach()
            squares = squares.masked_fill(size >= size.flatten().topk(dropped).values[-1], 0)
        if self.weights is not None:
            tokens, channels = (each.to(squares.device) for each in self.weights)
            squares = squares * tokens[list(indices)].unsqueeze(-1) * channels
        return squares.sum()

    def count(self, indices: Sequence[int]) -> int:
        """Return the number of terms in the sum over the windows ``indices``; the sum divided by it is the mean."""
        return sum(shape.numel() for shape in self.goal.shapes(indices))


class PredictionLoss(BlockLoss):
    """The KL divergence of the model's predictions from the float model's, at the outputs of the last block.

    It is the cross entropy of LFQ (arXiv 2605.29756) less the entropy of the float model's predictions, which is
    constant. The final norm and the output head stay as they are.
    """

    def __init__(self, goal: HiddenStates, ending: Ending) -> None:
        """Train towards the predictions at ``goal``, the float block's output for each batch."""
        self.goal, self.ending = Windows(goal), ending

    def summed(self, indices: Sequence[int], outputs: Tensor) -> Tensor:
        """Return the loss of ``outputs`` ``[b, t, d]``, summed over tokens, in nats."""
        places = [self.goal.places[index] for index in indices]
        with torch.no_grad():
            goal = self.ending.hidden(self.goal[indices], places)

        def part(hidden: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                teacher = self.ending.logits(goal[rows], floats=True)
            return kl(teacher, self.ending.logits(hidden)).sum()

        hidden = self.ending.hidden(outputs, places)
        return summed(part, hidden, slices_of(len(hidden), self.ending.vocabulary, hidden.device))

    def count(self, indices: Sequence[int]) -> int:
        """Return the number of tokens of the windows ``indices``."""
        return sum(shape[0] for shape in self.goal.shapes(indices))


def loss_of(
    task: BlockTask,
    last_block: str,
    outliers: float = 0.0,
    weights: tuple[Tensor, Tensor] | None = None,
    goal: HiddenStates | None = None,
) -> BlockLoss:
    """Return the loss of the block of ``task``; ``last_block`` is ``mse`` or ``kl``.

    Unset, ``goal`` is the float block's outputs, which are known. Rows that a head reads have the second moment of the
    inputs of all tokens only in the plain sum over them.

    Raises:
        InputError: The model does not show how it makes logits; the first block finds out.
    """
    goal = task.float_outputs if goal is None else goal
    assert goal is not None
    if last_block == "kl" and task.ending is not None:
        task.ending.check("last_block_loss: kl")
        if task.is_last:
            return PredictionLoss(goal, task.ending)
    return BlockLoss(goal, outliers=outliers, weights=weights, plain=task.is_head)
