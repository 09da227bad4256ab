"""Standard errors of the changes of lm-eval's metrics, from the answers of both models to the same items.

Two models that differ little give the same answer to most items, so the error of the difference of their accuracies is
far below the errors of both. It is that of paired proportions with half an observation added to each of the four cells
(Agresti and Min, Statistics in Medicine 24, 2005): without these, models that agree on a handful of items would have an
error of zero.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Answers(NamedTuple):
    """The scores of one task's items in one metric, in the order of the items."""

    items: tuple[str, ...]  # hash of each item
    scores: NDArray[np.float64]  # [n]


def answers(samples: Sequence[dict[str, Any]], metric: str, filter_: str) -> Answers | None:
    """Return the answers in ``samples``, which lm-eval logged; ``None`` if an item has no number as its score."""
    rows = [row for row in samples if row["filter"] == filter_]
    scores = [row.get(metric) for row in rows]
    if not rows or not all(isinstance(score, bool | int | float | np.number) for score in scores):
        return None
    return Answers(tuple(row["doc_hash"] for row in rows), np.array(scores, np.float64))


def change_error(
    ours: Sequence[Answers | None], theirs: Sequence[Answers | None], value: float, reference: float
) -> float | None:
    """Return the standard error of ``value - reference``, a metric of two models that gave these answers to some tasks.

    Of several tasks the metric is the mean over all items, or over the tasks. ``None`` if it is neither (F1, word
    perplexity), if the models did not answer the same items, or if one item is too few.
    """
    pairs = list(zip(ours, theirs, strict=True))
    found = [(a, b) for a, b in pairs if a is not None and b is not None and a.items == b.items]
    if not pairs or len(found) < len(pairs):
        return None
    ways = [
        [(np.concatenate([a.scores for a, _ in found]), np.concatenate([b.scores for _, b in found]))],  # over items
        [(a.scores, b.scores) for a, b in found],  # over tasks
    ]
    for way in ways:
        means = (math.fsum(side.mean() for side in sides) / len(way) for sides in zip(*way, strict=True))
        if all(map(math.isclose, means, (value, reference))):
            error = math.hypot(*(_error(a - b, a, b) for a, b in way)) / len(way)
            return error if math.isfinite(error) else None
    return None


def _error(differences: NDArray[np.float64], *scores: NDArray[np.float64]) -> float:
    """Return the standard error of the mean of ``differences`` of ``scores``; two items are added to scores in [0, 1].

    The differences of these two are 0, and half of +1 and half of -1.
    """
    added = 2 if all(each.min() >= 0 and each.max() <= 1 for each in scores) else 0
    count = len(differences) + added
    if count < 2:
        return math.nan
    squares = float(differences @ differences) + added / 2 - float(differences.sum()) ** 2 / count
    return math.sqrt(squares / (count if added else count - 1) / count)
