"""The number of calibration tokens that each expert of a mixture saw, in words."""

from collections.abc import Iterable
from itertools import groupby
from statistics import median
from typing import NamedTuple

from qtool.reports.records import EXPERT_TOKENS, Series

FEW = 16  # fewest tokens with which an expert counts as seen


class Coverage(NamedTuple):
    """The tokens that the experts of each block saw, in the order of blocks."""

    blocks: list[int]
    tokens: list[list[float]]

    def __str__(self) -> str:
        every = [count for each in self.tokens for count in each]
        few = sum(count < FEW for count in every)
        least, middle, most = (f"{value:,.0f}" for value in (min(every), median(every), max(every)))
        seen = f"{few} of {len(every)} saw fewer than {FEW}" if few else f"all of {len(every)} saw at least {FEW}"
        return f"{least} to {most} tokens, median {middle}; {seen}"


def coverage(found: Iterable[Series]) -> Coverage | None:
    """Return the tokens that experts saw; ``None`` if the model has no experts, or no text was read."""
    series = next((each for each in found if (each.name, each.per) == (EXPERT_TOKENS, "expert")), None)
    if series is None or not series.values:
        return None
    pairs = groupby(zip(series.at, series.values, strict=True), key=lambda pair: pair[0])
    tokens = [(block, [count for _, count in group]) for block, group in pairs]
    return Coverage([block for block, _ in tokens], [counts for _, counts in tokens])
