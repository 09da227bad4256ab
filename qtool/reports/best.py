"""The sentence of a comparison: which run is the best at which size.

Runs whose sizes differ by at most ``SAME_SIZE`` have one size: the headers of files make a few bytes of difference. The
best run of a size is named if no smaller run is better. Runs that are as good within the standard error of the
difference, and not larger, are named beside it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from qtool.reports.measures import ComparedRun, Measure, difference_error, weight_bytes
from qtool.reports.quality import judge
from qtool.reports.records import TaskResult
from qtool.reports.text import number
from qtool.reports.verdict import SIGMAS
from qtool.system.units import file_size

SAME_SIZE = 1.01


class Candidate(NamedTuple):
    """A run with its size and its number."""

    name: str
    size: int  # bytes of the weight files
    row: TaskResult
    cost: float  # lower is better


def sentence(runs: Sequence[ComparedRun], measure: Measure, title: str) -> str:
    """Return which runs are the best at their size by ``measure``, called ``title``; empty without two such runs."""
    found = [each for run in runs if (each := _candidate(run, measure)) is not None]
    if len(found) < 2:
        return ""
    winners, others = [], []
    best: Candidate | None = None
    for same in _by_size(found):
        first = min(same, key=lambda each: each.cost)
        if best is None or first.cost < best.cost:
            best = first
            tied = [each.name for each in found if each.size <= _upper(first) and _tied(each, first)]
            winners.append(_winner(first, tied))
        else:
            others += [each.name for each in same]
    some = "" if len(found) == len(runs) else f", of {len(found)} runs"
    how = ", with the change against the float model" if all(judge([each.row]) for each in found) else ""
    lines = [f"Best at each size by {title}{some}{how}: {', '.join(reversed(winners))}."]
    if others:
        lines.append(f"Larger than a run that is as good or better: {', '.join(others)}.")
    return " ".join(lines)


def _candidate(run: ComparedRun, measure: Measure) -> Candidate | None:
    row, size = run.results.get(measure), weight_bytes(run.report)
    if row is None or row.value is None or not math.isfinite(row.value) or not size or row.higher_is_better is None:
        return None
    return Candidate(run.name, size, row, -row.value if row.higher_is_better else row.value)


def _by_size(found: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the runs by size, from the smallest; a group holds those of one size."""
    groups: list[list[Candidate]] = []
    for each in sorted(found, key=lambda each: each.size):
        if groups and each.size <= _upper(groups[-1][0]):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _upper(candidate: Candidate) -> float:
    return candidate.size * SAME_SIZE


def _tied(a: Candidate, b: Candidate) -> bool:
    error = difference_error(a.row, b.row)
    return a is not b and (a.cost == b.cost or (error is not None and abs(a.cost - b.cost) <= SIGMAS * error))


def _winner(first: Candidate, tied: Sequence[str]) -> str:
    judged = judge([first.row])
    said = number(first.row.value, first.row.stderr) if judged is None else judged.change
    also = f"; as good within {SIGMAS} standard errors: {', '.join(tied)}" if tied else ""
    return f"{first.name} at {file_size(first.size)} ({said}{also})"
