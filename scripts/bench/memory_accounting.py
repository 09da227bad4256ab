"""Bytes that a training of all linears of a Llama holds, from shapes alone.

For LR-QAT, for ``lsq``, which trains all weights, and for Block-AP, EfficientQAT's first phase, which trains one block.
Three numbers: what is held between two steps (``held_bytes``), what autograd keeps for the backward (``saved_bytes``),
and the most that is alive at one time (``peak_bytes``). ``lrqat_memory.py`` measures the same, and
tests/training/test_memory_accounting.py fails when the code, torch or transformers come to hold something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.quant.fused_rounding import CHUNK_NUMBERS
from qtool.quant.packing import num_words


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key as query heads and untied embeddings, and the windows of a step."""

    hidden: int
    mlp: int
    blocks: int
    vocabulary: int
    heads: int
    batch: int
    length: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(out, in)`` of each linear of a block."""
        d, m = self.hidden, self.mlp
        return [(d, d)] * 4 + [(m, d)] * 2 + [(d, m)]

    @property
    def num_weights(self) -> int:
        """Weights of a block's linears."""
        return sum(rows * columns for rows, columns in self.linears)


@dataclass(frozen=True)
class Cell:
    """One training: the method's file, and what its memory depends on."""

    method: str  # lrqat, lsq (all weights train), efficientqat (Block-AP)
    phi: str = "fixed"  # of lrqat
    weights_again: bool = True  # lrqat's checkpoint_weights
    blocks_again: bool = False  # gradient_checkpointing
    dtype: str = "bfloat16"
    num_bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    rank: int = 32
    cuda: bool = False  # AdamW then moves all tensors at once; its counts and Block-AP's best state lie on the CPU

    @property
    def item(self) -> int:
        """Bytes of a number in the model's dtype."""
        return int(getattr(torch, self.dtype).itemsize)

    def num_groups(self, shape: Shape) -> int:
        """Scales of a block."""
        return sum(
            rows * (1 if self.group_size == -1 else columns // self.group_size) for rows, columns in shape.linears
        )


def held_bytes(shape: Shape, cell: Cell) -> dict[str, int]:
    """Bytes that are held between two steps, by what they are; of Block-AP those of the one block at work."""
    per_block = cell.method == "efficientqat"
    blocks, d = 1 if per_block else shape.blocks, shape.hidden
    weights, scales = blocks * shape.num_weights, blocks * cell.num_groups(shape)
    # starting scales: the units of their learning rates
    found = {"weights": 4 * weights, "grid": 8 * scales, "starting scales": 4 * scales}
    if cell.method == "lrqat":
        factors = blocks * sum(min(cell.rank, *pair) * sum(pair) for pair in shape.linears)
        words = blocks * sum(rows * num_words(columns, cell.num_bits) for rows, columns in shape.linears)
        found["weights"] = {"bfloat16": 2 * weights, "fixed": weights, "codes": 4 * words}.get(cell.phi, 4 * weights)
        found["factors"] = 4 * factors
        trained, tensors = factors + scales, 3
    else:
        zero_points = 0 if cell.symmetric else scales
        trained, tensors = weights + scales + zero_points, 2 if cell.symmetric else 3
    count = 0 if cell.cuda else 4
    found["optimizer"] = (
        8 * trained + count * tensors * len(shape.linears) * blocks
    )  # two moments, and a count for each
    if per_block:
        found["optimizer"] += 16 * d + 2 * count  # of the norms
        found["expanded"] = found["float weights"] = cell.item * weights
        found["start"] = weights + 8 * scales  # a byte for each code
        found["best state"] = 0 if cell.cuda else 4 * (trained + 2 * d)
        return found
    tables = 4 * (d // shape.heads)  # the frequencies of the rotary embedding, twice
    return found | {
        "embeddings": 2 * cell.item * shape.vocabulary * d,
        "norms": cell.item * d * (2 * blocks + 1) + tables,
    }


def activations(shape: Shape, cell: Cell, *, first: bool = False) -> int:
    """Bytes that the backward of a block needs beside what its linears make of their weights.

    Of the two norms their input in float32 and one number for each token; the inputs of q, k, v and of gate and up;
    queries, keys, values, the attention's result and the logarithms of its sums; gate, its SiLU, up and their product.
    The ``first`` block reads what needs no gradient, and neither does its first norm.
    """
    tokens, d = shape.batch * shape.length, shape.hidden
    norms = (1 if first else 2) * tokens * (4 * d + 4)
    return norms + cell.item * tokens * (6 * d + 4 * shape.mlp) + 4 * tokens * shape.heads


def weight_path(shape: Shape, cell: Cell, *, first: bool = False) -> int:
    """Bytes that the backward through the rounding of a block's weights needs, where they are not made again.

    Positions on the grid, scales, zero points, and the weights; those of q, k and v not where inputs need no gradient.
    """
    held = shape.num_weights - (3 * shape.hidden**2 if first else 0)
    return 4 * shape.num_weights + 8 * cell.num_groups(shape) + cell.item * held


def head(shape: Shape) -> int:
    """Bytes that the loss keeps: log probabilities, the true tokens, and a number."""
    predicted = shape.batch * (shape.length - 1)
    return predicted * (4 * shape.vocabulary + 8) + 4


def rotary(shape: Shape, cell: Cell) -> int:
    """Bytes of the sines and cosines that all blocks share."""
    return 2 * cell.item * shape.length * (shape.hidden // shape.heads)


def saved_bytes(shape: Shape, cell: Cell) -> dict[str, int]:
    """What autograd keeps at the end of the forward, parameters not counted."""
    tokens, d = shape.batch * shape.length, shape.hidden
    final = tokens * (4 * d + 4)  # of the norm before the head
    if cell.method == "efficientqat":
        # norms train, so what they multiply is kept; the loss keeps the difference to its goal, and the sizes of tokens
        # and channels
        at_the_loss = activations(shape, cell, first=True) + (2 * cell.item + 4) * tokens * d + 4 * (tokens + d)
        return {"weight path": weight_path(shape, cell), "activations": at_the_loss}
    if cell.blocks_again:
        return {"activations": shape.blocks * cell.item * tokens * d + final + head(shape)}
    each = [activations(shape, cell, first=index == 0) for index in range(shape.blocks)]
    found = {"activations": sum(each) + rotary(shape, cell) + final + head(shape)}
    if not (cell.method == "lrqat" and cell.weights_again):
        found["weight path"] = sum(weight_path(shape, cell, first=index == 0) for index in range(shape.blocks))
    return found


def peak_bytes(shape: Shape, cell: Cell) -> int:
    """The most bytes of tensors that are alive at one time in a step, the held ones included."""
    rest = _peak_of_a_block(shape, cell) if cell.method == "efficientqat" else _peak_of_the_model(shape, cell)
    return sum(held_bytes(shape, cell).values()) + rest


def _peak_of_the_model(shape: Shape, cell: Cell) -> int:
    """Beyond what is held, of the loss, of each block's backward, and of the optimizer's step."""
    low_rank, d, tokens = cell.method == "lrqat", shape.hidden, shape.batch * shape.length
    again = low_rank and cell.weights_again
    of_optimizer = held_bytes(shape, cell)["optimizer"]
    gradients = of_optimizer // 2 // shape.blocks  # of a block: float32, as both moments are
    # the gradient of log probabilities, that of logits, and what the loss of each token leaves
    predicted = shape.batch * (shape.length - 1)
    moments = [sum(saved_bytes(shape, cell).values()) + predicted * (8 * shape.vocabulary + 8)]
    # A block's backward begins with down_proj, when nothing of the block has been let go of yet. Beside the gradients
    # of its output and input there are those of its weight on their way through the grid, all float32.
    last = d * shape.mlp
    step = cell.item * tokens * d + (12 if again else 8 - cell.item) * last + of_chunk(d, shape.mlp)
    if again and not cell.blocks_again:
        step += cell.item * tokens * shape.mlp
    below = 0
    for index in range(shape.blocks):
        first = index == 0
        kept = activations(shape, cell, first=first) + (0 if again else weight_path(shape, cell, first=first))
        if cell.blocks_again:
            # in float32 the first norm reads the block's input itself, which is kept already
            shared = 0 if first or cell.item < 4 else cell.item * tokens * d
            below += cell.item * tokens * d
            alive = below + kept - shared
        else:
            below += kept
            alive = below
        moments.append(alive + rotary(shape, cell) + (shape.blocks - 1 - index) * gradients + step)
    scales = 4 * shape.blocks * cell.num_groups(shape)
    moments.append(shape.blocks * gradients + scales)  # AdamW moves a parameter in one pass; scales as they were before
    return max(moments)


def _peak_of_a_block(shape: Shape, cell: Cell) -> int:
    """Beyond what Block-AP holds, of the block's own backward, and of that through the rounding of all its weights."""
    n, scales, item = shape.num_weights, 4 * cell.num_groups(shape), cell.item
    value = 0 if item == 4 else 4  # of a weight, float32; where the block computes in that it is what is multiplied by
    tokens, (rows, columns) = shape.batch * shape.length, shape.linears[-1]
    kept = 4 * n + 2 * scales
    loss = activations(shape, cell, first=True) + (2 * item + 4) * tokens * shape.hidden
    loss += item * (rows * columns + tokens * (rows + columns))  # the first product's gradients, before anything goes
    # later every weight's gradient is in float32, and that of the last weight goes on to the grid first
    return max(kept + value * n + loss, kept + 4 * n + 4 * rows * columns + of_chunk(rows, columns))


def of_chunk(rows: int, columns: int) -> int:
    """Bytes beside the gradients while those of a few rows of a weight pass rounding: codes, and three masks."""
    return 7 * columns * min(rows, max(1, CHUNK_NUMBERS["cpu"] // columns))
