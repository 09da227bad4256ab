"""Marks in the place of quantized weights, by which their rows are found in a graph that other software built.

The graph builder is given a model whose quantized weights are numbers of rows: each input of a row holds the number of
that row, and all inputs share one number in memory. Whatever the builder does to rows (transposing, splitting), the
numbers say which rows of which weight it used; a copy, which would show that inputs were changed, is noticed too.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LIMIT = 1 << 24  # float32 holds each integer up to this


class Rows(NamedTuple):
    """Consecutive rows of a quantized weight."""

    name: str
    start: int
    length: int


class Marks:
    """Numbers for the rows of weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Number the rows of weights of the ``shapes`` ``(out, in)``."""
        self.shapes = dict(shapes)
        self._starts: dict[str, int] = {}
        total = 0
        for name, (rows, _) in shapes.items():
            self._starts[name] = total
            total += rows
        self.total = total

    def of(self, name: str) -> Tensor:
        """Return the marks float32 ``[out, in]`` of a weight, whose inputs share memory."""
        rows, columns = self.shapes[name]
        numbers = self._starts[name] + torch.arange(rows, dtype=torch.float32)
        return numbers.unsqueeze(1).expand(rows, columns)

    def find(self, array: np.ndarray, column: int) -> Rows | None:
        """Return the rows that ``array`` ``[., .]`` marks, whose inputs lie in the dimension ``column``.

        ``None``: the array holds no marks.
        """
        if array.ndim != 2 or array.strides[column] != 0:
            return None
        numbers = array.take(0, column).astype(np.int64)
        name = [name for name, start in self._starts.items() if start <= numbers[0]][-1]
        start = int(numbers[0]) - self._starts[name]
        rows, columns = self.shapes[name]
        in_order = np.array_equal(numbers, numbers[0] + np.arange(len(numbers)))
        assert in_order, name
        assert start + len(numbers) <= rows, name
        assert array.shape[column] == columns, name
        return Rows(name, start, len(numbers))
