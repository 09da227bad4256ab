"""``qtool compare``: several runs beside each other, from their ``report.json``.

A number is compared with others only when it was measured the same way: same task, metric, examples in the prompt,
limit, number of observations and precision, and, for what depends on the tokenizer or is measured against the float
model, the same float model. What was measured otherwise has a column of its own, and a note says so.

The best of a column is marked, and so is what cannot be told from it: what differs by no more than ``SIGMAS`` standard
errors of the difference. That error is made from those of the two changes against the float model where these are
known, because they come from the same text, else from those of the two numbers; in both cases as if independent.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qtool.reports import html
from qtool.reports.document import Document, Printable, Table
from qtool.reports.measures import (
    ComparedRun,
    Measure,
    compared_runs,
    difference_error,
    measures_of,
    notes,
    weight_bytes,
)
from qtool.reports.report import JSON_NAME, Report
from qtool.reports.text import metric_name, number
from qtool.reports.verdict import SIGMAS
from qtool.system.errors import InputError
from qtool.system.units import duration, size

if TYPE_CHECKING:
    from qtool.reports.drawing import Plot

HTML_NAME, MARKDOWN_NAME = "compare.html", "compare.md"
LEGEND = f"* best of its column; ~ cannot be told from the best (within {SIGMAS} standard errors of the difference)"


@dataclass(frozen=True)
class Comparison(Printable):
    """Runs from large to small, what was measured, and what is not comparable."""

    runs: tuple[ComparedRun, ...]
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
        models = [f"of {self._model_name(measure.model)}"] if len({other.model for other in alike}) > 1 else []
        return ", ".join([metric_name(measure.task, measure.metric), *measure.differing(alike), *models])

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
        return html.render(
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

    def plots(self) -> "list[Plot]":
        """Quality against bits per weight and against size, by the measure that says most; no figure without one."""
        for measure in self.measures:
            if any(run.results[measure].higher_is_better is not None for run in self.runs if measure in run.results):
                from qtool.reports import pareto

                return pareto.figures(self.runs, measure, self.title(measure))
        return []

    def heading(self) -> str:
        """One line: how many runs of which model."""
        models = list(dict.fromkeys(run.report.model for run in self.runs))
        return f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''} of {', '.join(models)}"

    def _model_name(self, identity: str) -> str:
        return next((run.report.model for run in self.runs if run.model == identity), identity)


def comparison(reports: dict[str, Report]) -> Comparison:
    """Return the comparison of reports by name."""
    runs = compared_runs(reports)
    measures = measures_of(runs)
    return Comparison(tuple(runs), tuple(measures), tuple(notes(runs, measures)))


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


def _names(paths: list[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    parts = [(path if path.is_dir() or path.name != JSON_NAME else path.parent).resolve().parts for path in paths]
    depth = next(
        (depth for depth in range(1, max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)), None
    )
    return [str(path) if depth is None else "/".join(p[-depth:]) for path, p in zip(paths, parts, strict=True)]
