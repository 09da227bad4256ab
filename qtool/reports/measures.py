"""Which numbers of several runs may be compared: those that were measured the same way.

That is the same task, metric, examples in the prompt, limit, number of observations and precision, and, for what
depends on the tokenizer or is measured against the float model, the same float model.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qtool.reports.records import TaskResult
from qtool.reports.report import Report

OF_ONE_MODEL = ("perplexity", "kl", "top-1 agreement")  # metrics that say nothing about another float model


class Measure(NamedTuple):
    """What was measured, and all that must be equal for two numbers to be comparable."""

    task: str
    metric: str
    num_fewshot: int | None
    limit: int | None
    n: int | None
    dtype: str
    model: str  # identity of the float model; empty where another one may be compared with

    def differing(self, alike: "Sequence[Measure]") -> list[str]:
        """The settings in words, but only those in which the measures ``alike`` differ."""
        settings = {
            "num_fewshot": "no prompt" if self.num_fewshot is None else f"{self.num_fewshot}-shot",
            "limit": "no limit" if self.limit is None else f"limit {self.limit}",
            "n": "n unknown" if self.n is None else f"n {self.n}",
            "dtype": self.dtype or "precision unknown",
        }
        return [text for key, text in settings.items() if len({getattr(each, key) for each in alike}) > 1]


@dataclass(frozen=True)
class ComparedRun:
    """A report and how it is called here."""

    name: str
    report: Report
    model: str  # identity of the float model
    results: dict[Measure, TaskResult] = field(repr=False)

    @property
    def grid(self) -> str:
        """Method and grid, or what else it is."""
        return " ".join(part for part in (self.report.method, self.report.label) if part) or "float"


def compared_runs(reports: Mapping[str, Report]) -> list[ComparedRun]:
    """Return the reports of ``reports``, by name, as runs from large to small."""
    models = _models(reports.values())
    runs = []
    for (name, report), model in zip(reports.items(), models, strict=True):
        results: dict[Measure, TaskResult] = {}
        for row in report.shown():
            own = model if row.metric in OF_ONE_MODEL else ""
            measure = Measure(row.task, row.metric, row.num_fewshot, row.limit, row.n, report.dtype or "", own)
            if row.value is not None:
                results[measure] = row
        runs.append(ComparedRun(name, report, model, results))
    runs.sort(key=lambda run: (-(run.report.bits_per_weight or 33), -(weight_bytes(run.report) or 0), run.name))
    return runs


def measures_of(runs: Sequence[ComparedRun]) -> list[Measure]:
    """Return everything that was measured; first what most runs have, and perplexity on real text before all else."""
    known = Counter(measure for run in runs for measure in run.results)
    return sorted(known, key=lambda m: (-known[m], _rank(m), *(str(each) for each in m)))


def _rank(measure: Measure) -> int:
    """Which measure says most: perplexity on real text, then on generated text, then divergence, then the rest."""
    if measure.metric == "perplexity":
        return int(measure.task == "generated")
    return 2 if measure.metric == "kl" else 3


def difference_error(a: TaskResult, b: TaskResult) -> float | None:
    """Standard error of the difference of two runs' numbers; ``None``: not known."""
    for x, y in ((a.delta_stderr, b.delta_stderr), (a.stderr, b.stderr)):
        if x is not None and y is not None:
            return math.hypot(x, y)
    return None


def weight_bytes(report: Report) -> int | None:
    """What the run's weights take on disk."""
    return report.quantized_bytes if report.quantized else report.float_bytes


def _models(reports: Iterable[Report]) -> list[str]:
    """What identifies each report's float model: its files' hashes, where a report of it has them, or its name."""
    reports = list(reports)
    hashes = [
        hashlib.sha256(json.dumps(report.lock["model_files"], sort_keys=True).encode()).hexdigest()
        if report.lock and "model_files" in report.lock
        else None
        for report in reports
    ]
    known = {report.model: found for report, found in zip(reports, hashes, strict=True) if found}
    return [found or known.get(report.model, report.model) for report, found in zip(reports, hashes, strict=True)]


def notes(runs: Sequence[ComparedRun], measures: Sequence[Measure]) -> Iterator[str]:
    """What a reader must know before comparing."""
    if len({run.model for run in runs}) > 1:
        by_model: dict[str, list[str]] = {}
        for run in runs:
            by_model.setdefault(run.report.model, []).append(run.name)
        listed = "; ".join(f"{model} ({', '.join(names)})" for model, names in by_model.items())
        yield f"Different float models: {listed}. Perplexity, KL divergence and agreement are compared within one only."
    alike: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        alike.setdefault((measure.task, measure.metric, measure.model), []).append(measure)
    for (task, metric, _), same in alike.items():
        if len(same) > 1:
            ways = []
            for measure in same:
                names = ", ".join(run.name for run in runs if measure in run.results)
                ways.append(f"{', '.join(measure.differing(same))} ({names})")
            yield f"{task} {metric} was measured in different ways, which are not comparable: {'; '.join(ways)}."
    for what in ("device", "backend"):
        found = {getattr(run.report, what) for run in runs if run.results} - {None}
        if len(found) > 1:
            yield f"Measured with another {what}: {', '.join(sorted(found))}; small differences may come from that."
