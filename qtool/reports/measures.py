"""Measures: a metric together with all settings that must be equal for two runs' numbers to be comparable.

These are task, metric, examples in the prompt, limit, number of observations and precision. Metrics that depend on the
tokenizer or are measured against the float model are comparable only between runs of the same float model.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qtool.config.sections import METRICS
from qtool.reports.records import TaskResult
from qtool.reports.report import Report
from qtool.reports.text import metric_name

OF_ONE_MODEL = ("perplexity", *METRICS["kl"])  # metrics that need the same float model to be comparable


class Measure(NamedTuple):
    """A metric and its settings; numbers are comparable if their measures are equal."""

    task: str
    metric: str
    num_fewshot: int | None
    limit: int | None
    n: int | None
    dtype: str
    model: str  # identity of the float model; empty if the metric does not depend on it

    def differing(self, alike: "Sequence[Measure]") -> list[str]:
        """Return the settings in words, but only those in which the measures ``alike`` differ."""
        settings = {
            "num_fewshot": "no prompt" if self.num_fewshot is None else f"{self.num_fewshot}-shot",
            "limit": "no limit" if self.limit is None else f"limit {self.limit}",
            "n": "n unknown" if self.n is None else f"n {self.n}",
            "dtype": self.dtype or "precision unknown",
        }
        return [text for key, text in settings.items() if len({getattr(each, key) for each in alike}) > 1]


@dataclass(frozen=True)
class ComparedRun:
    """A report, its name in the comparison, and its results by measure."""

    name: str
    report: Report
    model: str  # identity of the float model
    results: dict[Measure, TaskResult] = field(repr=False)
    file: Path | None = None  # the report.json it was read from

    @property
    def grid(self) -> str:
        """Method and quantization grid; ``float`` for a float model."""
        return " ".join(part for part in (self.report.method, self.report.label) if part) or "float"


def compared_runs(reports: Mapping[str, Report], files: Mapping[str, Path]) -> list[ComparedRun]:
    """Return ``reports``, by name, as runs from large to small; ``files`` are those they were read from, by name."""
    models = _models(reports.values())
    runs = []
    for (name, report), model in zip(reports.items(), models, strict=True):
        results: dict[Measure, TaskResult] = {}
        for row in report.shown():
            own = model if row.metric in OF_ONE_MODEL else ""
            measure = Measure(row.task, row.metric, row.num_fewshot, row.limit, row.n, report.dtype or "", own)
            if row.value is not None:
                results[measure] = row
        runs.append(ComparedRun(name, report, model, results, files.get(name)))
    runs.sort(key=lambda run: (-(run.report.bits_per_weight or 33), -(weight_bytes(run.report) or 0), run.name))
    return runs


def measures_of(runs: Sequence[ComparedRun]) -> list[Measure]:
    """Return all measures: first those of most runs, and among these perplexity on real text first."""
    known = Counter(measure for run in runs for measure in run.results)
    return sorted(known, key=lambda m: (-known[m], _rank(m), m.task, _place(m), *(str(each) for each in m)))


def _place(measure: Measure) -> int:
    """Return the place of a metric among those of its task, as far as qtool measures the task itself."""
    metrics = METRICS.get(measure.task, ())
    return metrics.index(measure.metric) if measure.metric in metrics else len(metrics)


def _rank(measure: Measure) -> int:
    """Rank a measure: perplexity on real text, then on generated text, then metrics of KL divergence, then others."""
    if measure.metric == "perplexity":
        return int(measure.task == "generated")
    return 2 if measure.task == "kl" else 3


def difference_error(a: TaskResult, b: TaskResult) -> float | None:
    """Return the standard error of the difference of two runs' numbers; ``None`` if unknown.

    Of numbers on the same windows it is that of the differences by window; else it is computed from the errors of both
    changes against the float model, or of both numbers, as if the two were independent.
    """
    if a.text is not None and a.text == b.text and len(a.windows) == len(b.windows) > 1:
        return _paired_error(a, b)
    for x, y in ((a.delta_stderr, b.delta_stderr), (a.stderr, b.stderr)):
        if x is not None and y is not None:
            return math.hypot(x, y)
    return None


def _paired_error(a: TaskResult, b: TaskResult) -> float | None:
    """Return the standard error of ``a - b`` from their values by window; of perplexities by the delta method."""
    factors = (1.0, 1.0)
    if a.metric == "perplexity":
        factors = (a.value or math.nan, b.value or math.nan)
    differences = [factors[0] * x - factors[1] * y for x, y in zip(a.windows, b.windows, strict=True)]
    if not all(map(math.isfinite, differences)):
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def weight_bytes(report: Report) -> int | None:
    """Return the size of the run's weights on disk."""
    return report.quantized_bytes if report.quantized else report.float_bytes


def _models(reports: Iterable[Report]) -> list[str]:
    """Return an identity of each report's float model: the hash of its files if any report has it, else its name."""
    reports = list(reports)
    hashes = [
        hashlib.sha256(json.dumps(report.lock.model_files, sort_keys=True).encode()).hexdigest()
        if report.lock
        else None
        for report in reports
    ]
    known = {report.model: found for report, found in zip(reports, hashes, strict=True) if found}
    return [found or known.get(report.model, report.model) for report, found in zip(reports, hashes, strict=True)]


def notes(runs: Sequence[ComparedRun], measures: Sequence[Measure]) -> Iterator[str]:
    """Yield notes on numbers that are not comparable, and on other differences between the runs."""
    if len({run.model for run in runs}) > 1:
        by_model: dict[str, list[str]] = {}
        for run in runs:
            by_model.setdefault(run.report.model, []).append(run.name)
        listed = "; ".join(f"{model} ({', '.join(names)})" for model, names in by_model.items())
        yield (
            f"Different float models: {listed}. Perplexity, KL divergence and agreement are compared only between runs "
            "of the same float model."
        )
    alike: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        alike.setdefault((measure.task, measure.metric, measure.model), []).append(measure)
    differing: dict[str, list[str]] = {}
    for (task, metric, _), same in alike.items():
        if len(same) > 1:
            ways = []
            for measure in same:
                names = ", ".join(run.name for run in runs if measure in run.results)
                ways.append(f"{', '.join(measure.differing(same))} ({names})")
            differing.setdefault("; ".join(ways), []).append(metric_name(task, metric))
    for each, metrics in differing.items():
        was = "was" if len(metrics) == 1 else "were"
        yield f"{', '.join(metrics)} {was} measured in different ways, which are not comparable: {each}."
    for what in ("device", "backend"):
        found = {getattr(run.report, what) for run in runs if run.results} - {None}
        if len(found) > 1:
            yield f"Measured with different {what}s: {', '.join(sorted(found))}. Small differences may come from that."
