"""``qtool compare``: several runs side by side, from their ``report.json``.

Numbers are compared only if they were measured the same way (``measures.py``); each way of measuring has a column.

In each column the best number is marked, and so are the numbers that are statistically indistinguishable from it: those
that differ by at most ``SIGMAS`` standard errors of the difference (``measures.difference_error``). Beside each number
is its change against the float model, whose own numbers are the first row.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qtool.reports import best, settings
from qtool.reports.document import Document, Printable, Table, parts
from qtool.reports.html import HTML_NAME as PAGE
from qtool.reports.html import render, unbroken
from qtool.reports.measures import (
    ComparedRun,
    Measure,
    compared_runs,
    difference_error,
    measures_of,
    notes,
    weight_bytes,
)
from qtool.reports.records import TaskResult, change_error
from qtool.reports.report import PLOTS_FOLDER, Report
from qtool.reports.text import bits, metric_name, number
from qtool.reports.verdict import SIGMAS
from qtool.system import reading
from qtool.system.errors import InputError
from qtool.system.printable import without_secrets
from qtool.system.units import duration, file_size, size
from qtool.system.writing import make_folder, write_text

if TYPE_CHECKING:
    from qtool.reports.drawing import Plot

HTML_NAME, MARKDOWN_NAME, COMPARE_NAME = "compare.html", "compare.md", "compare.json"
PAGE_WIDTH = 112  # characters of a table on the page, at the size of its text
LEGEND = (
    f"* best in its column; ~ as good as the best, within {SIGMAS} standard errors of the difference. A change is "
    "against the float model; its standard error is that of the difference."
)


@dataclass(frozen=True)
class Comparison(Printable):
    """Runs from large to small, their measures, and notes on numbers that are not comparable."""

    runs: tuple[ComparedRun, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """What was given and has no report, each with the reason."""

    def table(self) -> Table:
        """Return the table with a row for each float model, then for each run; the best numbers carry a mark."""
        whole = any(run.report.file_bits_per_weight is not None for run in self.runs)
        columns = ["run", "method", "bits/weight", *(["of file"] if whole else []), "size"]
        beside: list[int] = []
        for measure in self.measures:
            names = [self.title(measure), *(["change"] if self._compared(measure) else [])]
            names += ["to the best"] if measure == self._first() else []
            beside += range(len(columns) + 1, len(columns) + len(names))
            columns += names
        columns += ["quantize", "peak memory"]
        beside.append(len(columns) - 1)
        rows = [
            [label, "", "", *([""] if whole else []), _size(run.report.float_bytes), *self._float_cells(run), "", ""]
            for label, run in self._floats()
        ]
        marks = {measure: self.marks(measure) for measure in self.measures}
        for index, run in enumerate(self.runs):
            report = run.report
            of_file = [bits(report.file_bits_per_weight)] if whole else []
            held, taken = report.quantize_peak(), report.seconds.get("quantize")
            cells = [cell for measure in self.measures for cell in self._cells(index, measure, marks[measure])]
            costs = ["" if taken is None else duration(taken), size(held) if held else ""]
            sizes = [bits(report.bits_per_weight), *of_file, _size(weight_bytes(report))]
            rows.append([f"{index + 1} {run.name}", run.grid, *sizes, *cells, *costs])
        return Table(columns, rows, "ll" + "r" * (len(columns) - 2), beside=beside, legend=LEGEND)

    def sentence(self) -> str:
        """Return which runs are the best at which size; empty if too few can be compared."""
        first = self._first()
        return "" if first is None else best.sentence(self.runs, first, self.title(first))

    def _first(self) -> Measure | None:
        """Return the measure of the sentence and the figures: the first that is known to be better lower or higher."""
        return next(
            (each for each in self.measures if any(row.higher_is_better is not None for row in self._rows(each))), None
        )

    def _rows(self, measure: Measure) -> list[TaskResult]:
        return [run.results[measure] for run in self.runs if measure in run.results]

    def _compared(self, measure: Measure) -> bool:
        """Return whether the change against the float model is known of any run."""
        return any(row.delta is not None for row in self._rows(measure))

    def _cells(self, index: int, measure: Measure, marks: dict[int, str]) -> list[str]:
        """Return the cells of a run for a measure: the number, its change, and its difference to the best one."""
        row = self.runs[index].results.get(measure)
        cells = ["" if row is None else number(row.value, row.stderr) + marks.get(index, "")]
        if self._compared(measure):
            cells.append("" if row is None else number(row.delta, change_error(row), sign="+"))
        if measure == self._first():
            found = self._to_the_best(index, measure, marks)
            cells.append("" if found is None else number(*found, sign="+"))
        return cells

    def _to_the_best(self, index: int, measure: Measure, marks: dict[int, str]) -> tuple[float, float | None] | None:
        """Return the difference of a run's number to the best one, and its standard error; ``None`` for the best."""
        first = next((each for each, mark in marks.items() if mark == " *"), None)
        row = self.runs[index].results.get(measure)
        if first is None or row is None or row.value is None or marks.get(index) == " *":
            return None
        other = self.runs[first].results[measure]
        return row.value - (other.value or 0.0), difference_error(row, other)

    def _floats(self) -> list[tuple[str, ComparedRun]]:
        """Return a name and a run for each float model that no run is of itself, and whose numbers are known."""
        found: dict[str, ComparedRun] = {}
        for run in self.runs:
            if any(row.float_value is not None for row in run.results.values()):
                found.setdefault(run.model, run)
        for run in self.runs:
            if run.report.quantized is None:
                found.pop(run.model, None)
        return [("float" if len(found) == 1 else f"float {run.report.model}", run) for run in found.values()]

    def _float_cells(self, run: ComparedRun) -> list[str]:
        """Return the cells of the float model of ``run``, measured beside the first run that has the number."""
        cells = []
        for measure in self.measures:
            rows = [each.results.get(measure) for each in self.runs if each.model == run.model]
            row = next((row for row in rows if row is not None and row.float_value is not None), None)
            cells.append("" if row is None else number(row.float_value, row.float_stderr))
            cells += [""] * (self._compared(measure) + (measure == self._first()))
        return cells

    def title(self, measure: Measure) -> str:
        """Return the name of a column, with the settings that distinguish it from other columns."""
        alike = [other for other in self.measures if (other.task, other.metric) == (measure.task, measure.metric)]
        models = [f"of {self._model_name(measure.model)}"] if len({other.model for other in alike}) > 1 else []
        return ", ".join([metric_name(measure.task, measure.metric), *measure.differing(alike), *models])

    def marks(self, measure: Measure) -> dict[int, str]:
        """Return marks by index of a run: `` *`` for the best of a column, `` ~`` for runs as good within the error."""
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
        """Return the sentence, the table of all runs, the settings that differ, and the notes."""
        return Document(
            title=self.heading(),
            headline=self.sentence(),
            warnings=[f"left out: {line}" for line in self.left_out],
            tables=[self.table(), *filter(None, [settings.table(self.runs)])],
            notes=self.notes,
        )

    def html(self, folder: Path | None = None) -> str:
        """Return the comparison as one self-contained HTML page, to be written into ``folder``.

        Its links to the pages of the runs begin there; without a folder they lead to where the runs are now.
        """
        return self._page(self.plots(), folder)

    def _page(self, plots: "Sequence[Plot]", folder: Path | None) -> str:
        whole, others = self.table(), settings.table(self.runs)
        return render(
            "compare.html",
            plots,
            title=self.heading(),
            sentence=unbroken(self.sentence()),
            left_out=self.left_out,
            beside=whole,
            beside_parts=parts(whole, PAGE_WIDTH),
            links={f"{index} {run.name}": _link(run, folder) for index, run in enumerate(self.runs, 1)},
            settings=others,
            settings_parts=parts(others, PAGE_WIDTH) if others else [],
            legend=LEGEND,
            notes=self.notes,
        )

    def write(self, folder: Path) -> None:
        """Write ``compare.html``, ``compare.md``, ``compare.json`` and the figures into ``folder``.

        Raises:
            InputError: The folder cannot be created, or holds such files that qtool did not write.
        """
        from qtool.reports import drawing

        own = (COMPARE_NAME, HTML_NAME, MARKDOWN_NAME)
        make_folder(folder, (*own, PLOTS_FOLDER), ours=_is_comparison(folder / COMPARE_NAME))
        plots = self.plots()
        write_text(folder / HTML_NAME, self._page(plots, folder))
        write_text(folder / MARKDOWN_NAME, self.markdown())
        write_text(folder / COMPARE_NAME, json.dumps(without_secrets(self.as_dict()), indent=2) + "\n")
        if plots:
            drawing.save(plots, folder)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for ``compare.json``; infinity and NaN are text, because JSON has neither."""
        columns = []
        for measure in self.measures:
            marks = self.marks(measure)
            values: list[dict[str, Any] | None] = []
            for index, run in enumerate(self.runs):
                row = run.results.get(measure)
                if row is None:
                    values.append(None)
                    continue
                known = {"value", "stderr", "float_value", "float_stderr", "delta", "delta_stderr"}
                difference, error = self._to_the_best(index, measure, marks) or (None, None)
                shown = row.model_dump(mode="json", include=known)
                shown |= {"best": marks.get(index) == " *", "like_best": index in marks}
                values.append(shown | {"to_the_best": _plain(difference), "to_the_best_stderr": _plain(error)})
            columns.append({"name": self.title(measure), **measure._asdict(), "values": values})
        runs = [
            {
                "name": run.name,
                "report": None if run.file is None else str(run.file),
                "method": run.report.method,
                "label": run.report.label,
                "bits_per_weight": run.report.bits_per_weight,
                "file_bits_per_weight": run.report.file_bits_per_weight,
                "bytes": weight_bytes(run.report),
                "headline": run.report.headline(),
            }
            for run in self.runs
        ]
        found = {"best": self.sentence(), "runs": runs, "measures": columns, "settings": settings.differing(self.runs)}
        return found | {"notes": list(self.notes), "left_out": list(self.left_out)}

    def plots(self) -> "list[Plot]":
        """Return the figures of quality, by the measure of the sentence, against size."""
        first = self._first()
        if first is None:
            return []
        from qtool.reports import pareto

        return pareto.figures(self.runs, first, self.title(first))

    def heading(self) -> str:
        """Return one line: the number of runs and their models."""
        models = list(dict.fromkeys(run.report.model for run in self.runs))
        return f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''} of {', '.join(models)}"

    def _model_name(self, identity: str) -> str:
        return next((run.report.model for run in self.runs if run.model == identity), identity)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else file_size(num_bytes)


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _link(run: ComparedRun, folder: Path | None) -> str | None:
    """Return a link to the page of a run, relative to ``folder`` if it is given; ``None`` if there is no page."""
    page = None if run.file is None else run.file.with_name(PAGE)
    if page is None or not page.is_file():
        return None
    if folder is None:
        return page.resolve().as_uri()
    return quote(os.fsencode(os.path.relpath(page.resolve(), folder.resolve())))


def _is_comparison(file: Path) -> bool:
    """Return whether a file is a comparison that qtool wrote."""
    with suppress(FileNotFoundError, InputError):
        return {"runs", "measures"} <= reading.read_object(file).keys()
    return False


def comparison(
    reports: dict[str, Report], files: dict[str, Path] | None = None, left_out: Sequence[str] = ()
) -> Comparison:
    """Return the comparison of reports by name; ``files`` are those they were read from."""
    runs = compared_runs(reports, files or {})
    measures = measures_of(runs)
    return Comparison(tuple(runs), tuple(measures), tuple(notes(runs, measures)), tuple(left_out))
