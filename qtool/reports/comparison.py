"""``qtool compare``: several runs beside each other, from their ``report.json``.

A number is compared with others only when it was measured the same way: same task, metric, examples in the prompt,
limit, number of observations and precision, and, for what depends on the tokenizer or is measured against the float
model, the same float model. What was measured otherwise has a column of its own, and a note says so.

The best of a column is marked, and so is what cannot be told from it: what differs by no more than ``SIGMAS`` standard
errors of the difference. That error is made from those of the two changes against the float model where these are
known, because they come from the same text, else from those of the two numbers; in both cases as if independent.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from qtool.reports import html as html_page
from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import TaskResult
from qtool.reports.report import JSON_NAME, Report
from qtool.reports.text import metric_name, number
from qtool.reports.verdict import SIGMAS
from qtool.system.errors import InputError
from qtool.system.units import duration, size

if TYPE_CHECKING:
    from qtool.reports.drawing import Plot

HTML_NAME, MARKDOWN_NAME = "compare.html", "compare.md"
OF_ONE_MODEL = ("perplexity", "kl", "top-1 agreement")  # metrics that say nothing about another float model
LEGEND = f"* best of its column; ~ cannot be told from the best (within {SIGMAS} standard errors of the difference)"


class Measure(NamedTuple):
    """What was measured, and all that must be equal for two numbers to be comparable."""

    task: str
    metric: str
    num_fewshot: int | None
    limit: int | None
    n: int | None
    dtype: str
    model: str  # identity of the float model; empty where another one may be compared with


@dataclass(frozen=True)
class Run:
    """A report and how it is called here."""

    name: str
    report: Report
    model: str  # identity of the float model
    results: dict[Measure, TaskResult] = field(repr=False)

    @property
    def grid(self) -> str:
        """Method and grid, or what else it is."""
        return " ".join(part for part in (self.report.method, self.report.label) if part) or "float"


@dataclass(frozen=True)
class Comparison(Printable):
    """Runs from large to small, what was measured, and what is not comparable."""

    runs: tuple[Run, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]

    def columns(self) -> list[str]:
        """Names of the columns."""
        return ["run", "method", "bits/weight", "MB", *map(self.title, self.measures), "quantize", "peak memory"]

    def rows(self) -> list[list[str]]:
        """A cell for each of ``columns()`` and run; the best numbers carry a mark."""
        marks = {measure: self.marks(measure) for measure in self.measures}
        rows = []
        for index, run in enumerate(self.runs):
            report = run.report
            bits = "" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"
            num_bytes = weight_bytes(report)
            taken, held = report.seconds.get("quantize"), max(report.peak_bytes.values(), default=0)
            cells = [
                number(row.value, row.stderr) + marks[measure].get(index, "")
                if (row := run.results.get(measure))
                else ""
                for measure in self.measures
            ]
            sizes = [bits, "" if num_bytes is None else f"{num_bytes / 1e6:.2f}"]
            costs = ["" if taken is None else duration(taken), size(held) if held else ""]
            rows.append([f"{index + 1} {run.name}", run.grid, *sizes, *cells, *costs])
        return rows

    def title(self, measure: Measure) -> str:
        """The name of a column: as much as tells it from the others."""
        alike = [other for other in self.measures if (other.task, other.metric) == (measure.task, measure.metric)]
        settings = {
            "num_fewshot": f"{measure.num_fewshot}-shot",
            "limit": "no limit" if measure.limit is None else f"limit {measure.limit}",
            "n": f"n {measure.n}",
            "dtype": measure.dtype,
            "model": f"of {self._model_name(measure.model)}",
        }
        different = [text for key, text in settings.items() if len({getattr(other, key) for other in alike}) > 1]
        return ", ".join([metric_name(measure.task, measure.metric), *different])

    def marks(self, measure: Measure) -> dict[int, str]:
        """`` *`` for the best run of a column and `` ~`` for those that cannot be told from it, by index."""
        rows = {
            index: row
            for index, run in enumerate(self.runs)
            if (row := run.results.get(measure)) and row.value is not None and math.isfinite(row.value)
        }
        better = {row.higher_is_better for row in rows.values()}
        if len(rows) < 2 or len(better) != 1 or None in better:
            return {}
        sign = -1 if better.pop() else 1
        lowest = min(sign * row.value for row in rows.values() if row.value is not None)
        best = [index for index, row in rows.items() if row.value is not None and sign * row.value == lowest]
        marks = dict.fromkeys(best, " *")
        for index, row in rows.items():
            error = difference_error(row, rows[best[0]])
            if index not in marks and error is not None and abs((row.value or 0) - sign * lowest) <= SIGMAS * error:
                marks[index] = " ~"
        return marks

    def document(self) -> Document:
        """The table of all runs, and what a reader must know before comparing."""
        return Document(title=self.heading(), tables=[self.table()], legend=LEGEND, notes=self.notes)

    def table(self) -> Table:
        """A row for each run."""
        columns = self.columns()
        return Table(columns, self.rows(), "ll" + "r" * (len(columns) - 2))

    def html(self) -> str:
        """The comparison as a page that needs nothing else."""
        return self._page(self.plots())

    def _page(self, plots: "Sequence[Plot]") -> str:
        return html_page.render(
            "compare.html", plots, title=self.heading(), table_=self.table(), legend=LEGEND, notes=self.notes
        )

    def write(self, folder: Path) -> None:
        """Write ``compare.html``, ``compare.md``, ``compare.json`` and the figures into ``folder``.

        Raises:
            InputError: the folder cannot be made.
        """
        from qtool.reports import drawing

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be the folder of the comparison: {error.strerror}") from None
        plots = self.plots()
        (folder / HTML_NAME).write_text(self._page(plots), encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(self.markdown(), encoding="utf-8")
        (folder / "compare.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        if plots:
            drawing.save(plots, folder)

    def as_dict(self) -> dict[str, Any]:
        """The comparison for machines: JSON has no infinity and no NaN, so these are text, as in a report."""
        columns = []
        for measure in self.measures:
            marks = self.marks(measure)
            values = [
                None
                if (row := run.results.get(measure)) is None
                else row.model_dump(mode="json", include={"value", "stderr", "delta", "delta_stderr"})
                | {"best": marks.get(index) == " *", "like_best": index in marks}
                for index, run in enumerate(self.runs)
            ]
            columns.append({"name": self.title(measure), **measure._asdict(), "values": values})
        runs = [
            {
                "name": run.name,
                "method": run.report.method,
                "label": run.report.label,
                "bits_per_weight": run.report.bits_per_weight,
                "bytes": weight_bytes(run.report),
                "headline": run.report.headline(),
            }
            for run in self.runs
        ]
        return {"runs": runs, "measures": columns, "notes": list(self.notes)}

    def judged(self) -> Measure | None:
        """What quality is plotted by: what most runs have; perplexity on real text before all else."""
        directed = (m for m in self.measures if any(r.results[m].higher_is_better is not None for r in self._with(m)))
        return next(directed, None)

    def plots(self) -> "list[Plot]":
        """Quality against bits per weight and against size."""
        measure = self.judged()
        if measure is None:
            return []
        from qtool.reports import pareto

        rows = {run.name: run.results[measure] for run in self._with(measure)}
        higher = any(row.higher_is_better for row in rows.values())
        floats = {_finite(row.float_value) for row in rows.values()}
        reference = floats.pop() if len(floats) == 1 else None
        paired = reference is not None and all(_finite(row.delta_stderr) is not None for row in rows.values())
        drawn = []
        for name, label, of in (
            ("pareto-bits", "bits per weight", lambda report: report.bits_per_weight),
            ("pareto-size", "MB on disk", lambda report: None if (b := weight_bytes(report)) is None else b / 1e6),
        ):
            points = [
                pareto.Point(index + 1, run.name, x, y, _finite(row.delta_stderr if paired else row.stderr))
                for index, run in enumerate(self.runs)
                if (row := rows.get(run.name))
                and (y := _finite(row.value)) is not None
                and (x := of(run.report)) is not None
            ]
            if len(points) > 1:
                plane = pareto.Plane(label, self.title(measure), higher, reference, paired)
                drawn.append(pareto.plot(name, points, plane))
        return drawn

    def heading(self) -> str:
        """One line: how many runs of which model."""
        models = list(dict.fromkeys(run.report.model for run in self.runs))
        return f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''} of {', '.join(models)}"

    def _with(self, measure: Measure) -> list[Run]:
        """The runs that have a number for it."""
        return [run for run in self.runs if measure in run.results]

    def _model_name(self, identity: str) -> str:
        return next((run.report.model for run in self.runs if run.model == identity), identity)


def compare(paths: Iterable[Path]) -> Comparison:
    """The runs in folders that have a ``report.json``, or in such files, whatever their order.

    Raises:
        InputError: naming every path without a report, with a damaged one, or given twice.
    """
    paths = list(paths)
    faults, reports = [], {}
    for path in paths:
        file = path / JSON_NAME if path.is_dir() else path
        try:
            reports[path] = Report.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            what = f"no {JSON_NAME}; qtool ptq, qat, ... and qtool eval -o write one"
            faults.append(f"{path} has {what}" if path.is_dir() else f"{path} cannot be read: {error.strerror}")
        except (ValidationError, ValueError) as error:
            faults.append(f"{file} is not a report of a run: {str(error).splitlines()[0]}")
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            faults.append(f"{path} is given {count} times")
    if not paths:
        faults.append("no run was given")
    if faults:
        raise InputError("\n  ".join(["these runs cannot be compared:", *faults]))
    return comparison(dict(zip(_names(list(reports)), reports.values(), strict=True)))


def comparison(reports: dict[str, Report]) -> Comparison:
    """The same of reports by name."""
    models = _models(reports.values())
    runs = []
    for (name, report), model in zip(reports.items(), models, strict=True):
        results: dict[Measure, TaskResult] = {}
        for row in report.shown():
            own = model if row.metric in OF_ONE_MODEL else ""
            measure = Measure(row.task, row.metric, row.num_fewshot, row.limit, row.n, report.dtype or "", own)
            if row.value is not None:
                results[measure] = row
        runs.append(Run(name, report, model, results))
    runs.sort(key=lambda run: (-(run.report.bits_per_weight or 33), -(weight_bytes(run.report) or 0), run.name))
    known = Counter(measure for run in runs for measure in run.results)
    ordered = sorted(known, key=lambda m: (-known[m], _rank(m), *(str(each) for each in m)))
    return Comparison(tuple(runs), tuple(ordered), tuple(_notes(runs, ordered)))


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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _names(paths: list[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    parts = [(path if path.is_dir() or path.name != JSON_NAME else path.parent).resolve().parts for path in paths]
    depth = next(
        (depth for depth in range(1, max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)), None
    )
    return [str(path) if depth is None else "/".join(p[-depth:]) for path, p in zip(paths, parts, strict=True)]


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


def _notes(runs: Sequence[Run], measures: Sequence[Measure]) -> Iterator[str]:
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
            ways = "; ".join(f"{_settings(m)} ({', '.join(r.name for r in runs if m in r.results)})" for m in same)
            yield f"{task} {metric} was measured in different ways, which are not comparable: {ways}."
    for what in ("device", "backend"):
        found = {getattr(run.report, what) for run in runs if run.results} - {None}
        if len(found) > 1:
            yield f"Measured with another {what}: {', '.join(sorted(found))}; small differences may come from that."


def _settings(measure: Measure) -> str:
    parts = [
        "no limit" if measure.limit is None else f"limit {measure.limit}",
        "" if measure.num_fewshot is None else f"{measure.num_fewshot}-shot",
        "" if measure.n is None else f"n {measure.n}",
        measure.dtype,
    ]
    return ", ".join(part for part in parts if part)
