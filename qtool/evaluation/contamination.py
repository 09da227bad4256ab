"""Contamination: the share of an evaluated text that a model has already seen in calibration, measured on tokens.

A run is ``OVERLAP_TOKENS`` consecutive tokens inside a window. The overlap is the share of the evaluated text's runs
that occur anywhere in the calibration windows, in any window and at any position. Thirteen tokens are the length that
GPT-3's authors took for their own check (arXiv 2005.14165, appendix C): long enough that idioms and markup seldom reach
it, short enough that a copied sentence always does. The overlap with the test split of WikiText-2 (tokens of the
built-in model) is 0.16 % for its whole training split, and 0.007 % for 4096 windows of 512 tokens of Wikipedia without
its articles; one of its sixty articles would be 1.7 %. From ``OVERLAP_WARNING`` (``reports/records.py``) on, a copy is
the likelier cause.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.reports.records import OVERLAP_TOKENS

CHUNK = 1 << 20  # number of calibration tokens looked up at once
FACTORS = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))  # odd multipliers of the hash, as int64
_SPLIT = "calibrated on the training split of the same data: same distribution, other texts"
RELATIONS = {  # notes by calibration source and task
    ("wikitext2", "wikitext2"): _SPLIT,
    ("wikitext2", "wikitext"): _SPLIT,
    ("enwiki", "wikitext2"): "calibrated on Wikipedia too",
    ("enwiki", "wikitext"): "calibrated on Wikipedia too",
    ("c4", "c4"): _SPLIT,
    ("generated", "generated"): "calibrated on text by the same writer: same distribution, other text",
}


class CalibrationSeen(NamedTuple):
    """The text that a model was calibrated on."""

    source: str
    tokens: Tensor | None  # [n, t]; None: the text is not available


def overlap(calibration: Tensor, evaluation: Tensor) -> float | None:
    """Return the share of the runs of ``evaluation`` ``[m, s]`` that occur in ``calibration`` ``[n, t]``.

    ``None``: the windows of ``evaluation`` are shorter than a run. Runs are compared by 64-bit hashes: among a billion
    pairs, the odds of one chance match are one in ten billion.
    """
    wanted, counts = _fingerprints(evaluation).unique(return_counts=True)  # sorted
    if not len(wanted):
        return None
    found = torch.zeros(len(wanted), dtype=torch.bool)
    for windows in calibration.split(max(1, CHUNK // calibration.shape[1])):
        have = _fingerprints(windows)
        at = torch.searchsorted(wanted, have).clamp_(max=len(wanted) - 1)
        found[at[wanted[at] == have]] = True
    return float(counts[found].sum() / counts.sum())


def _fingerprints(windows: Tensor) -> Tensor:
    """Return the hashes of all runs in ``windows`` ``[n, t]`` as one row of int64; arithmetic wraps around."""
    num = windows.shape[1] - OVERLAP_TOKENS + 1
    if num < 1:
        return torch.empty(0, dtype=torch.int64)
    mixed = (windows.cpu().long() + 1) * FACTORS[0]
    mixed = (mixed ^ (mixed >> 29)) * FACTORS[1]  # mixed, so that sums of neighbouring ids differ
    total = mixed[:, :num].clone()
    for offset in range(1, OVERLAP_TOKENS):
        total.mul_(FACTORS[0]).add_(mixed[:, offset : offset + num])
    return total.flatten()


def relation(source: str, task: str) -> str:
    """Return a note on how the texts of ``source`` and ``task`` are related, whatever their overlap; ``""``: none."""
    return RELATIONS.get((source, task), "")
