"""``qtool compare``: several runs side by side, from their ``report.json``.

Numbers are compared only if they were measured the same way (``measures.py``); each way of measuring has a column.

In each column the best number is marked, and so are the numbers that are statistically indistinguishable from it: those
that differ by at most ``SIGMAS`` standard errors of the difference. The standard error of a difference is computed from
the standard errors of the two runs' changes against the float model if both are known, because both runs read the same
text, else from the standard errors of the two numbers; in either case as if the two were independent.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.reports.document import Document, Printable, Table
from qtool.reports.html import render
from qtool.reports.measures import (
    ComparedRun,
    Measure,
    compared_runs,
    difference_error,
    measures_of,
    notes,
    weight_bytes,
)
from qtool.reports.report import JSON_NAME, PLOTS_FOLDER, Report
from qtool.reports.text import bits, megabytes, metric_name, number
from qtool.reports.verdict import SIGMAS
from qtool.system import reading
from qtool.system.errors import InputError, listing
from qtool.system.printable import printable, without_secrets
from qtool.system.units import duration, size
from qtool.system.writing import make_folder, write_text

if TYPE_CHECKING:
    from qtool.reports.drawing import Plot

HTML_NAME, MARKDOWN_NAME, COMPARE_NAME = "compare.html", "compare.md", "compare.json"
LEGEND = f"* best in its column; ~ as good as the best, within {SIGMAS} standard errors of the difference"


@dataclass(frozen=True)
class Comparison(Printable):
    """Runs from large to small, their measures, and notes on numbers that are not comparable."""

    runs: tuple[ComparedRun, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        whole = ["of file"] if self._knows_files() else []
        sizes = ["bits/weight", *whole, "MB"]
        return ["run", "method", *sizes, *map(self.title, self.measures), "quantize", "peak memory"]

    def _knows_files(self) -> bool:
        """Return whether the bits per weight of the whole file are known of any run."""
        return any(run.report.file_bits_per_weight is not None for run in self.runs)

    def rows(self) -> list[list[str]]:
        """Return a row for each run with a cell for each of ``columns()``; the best numbers carry a mark."""
        marks = {measure: self.marks(measure) for measure in self.measures}
        rows = []
        for index, run in enumerate(self.runs):
            report = run.report
            whole = [bits(report.file_bits_per_weight)] if self._knows_files() else []
            sizes = [bits(report.bits_per_weight), *whole, megabytes(weight_bytes(report))]
            taken, held = report.seconds.get("quantize"), max(report.peak_bytes.values(), default=0)
            cells = [
                number(row.value, row.stderr) + marks[measure].get(index, "")
                if (row := run.results.get(measure))
                else ""
                for measure in self.measures
            ]
            costs = ["" if taken is None else duration(taken), size(held) if held else ""]
            rows.append([f"{index + 1} {run.name}", run.grid, *sizes, *cells, *costs])
        return rows

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
        """Return the table of all runs with its legend and notes."""
        return Document(title=self.heading(), tables=[self.table()], legend=LEGEND, notes=self.notes)

    def table(self) -> Table:
        """Return the table with a row for each run."""
        columns = self.columns()
        return Table(columns, self.rows(), "ll" + "r" * (len(columns) - 2))

    def html(self) -> str:
        """Return the comparison as one self-contained HTML page."""
        return self._page(self.plots())

    def _page(self, plots: "Sequence[Plot]") -> str:
        return render("compare.html", plots, title=self.heading(), table_=self.table(), legend=LEGEND, notes=self.notes)

    def write(self, folder: Path) -> None:
        """Write ``compare.html``, ``compare.md``, ``compare.json`` and the figures into ``folder``.

        Raises:
            InputError: The folder cannot be created, or holds such files that qtool did not write.
        """
        from qtool.reports import drawing

        own = (COMPARE_NAME, HTML_NAME, MARKDOWN_NAME)
        make_folder(folder, (*own, PLOTS_FOLDER), ours=_is_comparison(folder / COMPARE_NAME))
        plots = self.plots()
        write_text(folder / HTML_NAME, self._page(plots))
        write_text(folder / MARKDOWN_NAME, self.markdown())
        write_text(folder / COMPARE_NAME, json.dumps(without_secrets(self.as_dict()), indent=2) + "\n")
        if plots:
            drawing.save(plots, folder)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for ``compare.json``; infinity and NaN are text, because JSON has neither."""
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
                "file_bits_per_weight": run.report.file_bits_per_weight,
                "bytes": weight_bytes(run.report),
                "headline": run.report.headline(),
            }
            for run in self.runs
        ]
        return {"runs": runs, "measures": columns, "notes": list(self.notes)}

    def plots(self) -> "list[Plot]":
        """Return the figures of quality against size.

        Quality is the first measure that is known to be better when higher, or when lower; without one, no figure.
        """
        for measure in self.measures:
            if any(run.results[measure].higher_is_better is not None for run in self.runs if measure in run.results):
                from qtool.reports import pareto

                return pareto.figures(self.runs, measure, self.title(measure))
        return []

    def heading(self) -> str:
        """Return one line: the number of runs and their models."""
        models = list(dict.fromkeys(run.report.model for run in self.runs))
        return f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''} of {', '.join(models)}"

    def _model_name(self, identity: str) -> str:
        return next((run.report.model for run in self.runs if run.model == identity), identity)


def _is_comparison(file: Path) -> bool:
    """Return whether a file is a comparison that qtool wrote."""
    with suppress(FileNotFoundError, InputError):
        return {"runs", "measures"} <= reading.read_object(file).keys()
    return False


def comparison(reports: dict[str, Report]) -> Comparison:
    """Return the comparison of reports by name."""
    runs = compared_runs(reports)
    measures = measures_of(runs)
    return Comparison(tuple(runs), tuple(measures), tuple(notes(runs, measures)))


def compare(paths: Iterable[Path]) -> Comparison:
    """Compare the runs in ``paths``: folders with a ``report.json``, or such files, in any order.

    Raises:
        InputError: Names every path that has no report, has a damaged one, or is given twice.
    """
    paths = list(paths)
    faults, reports = [], {}
    for path in paths:
        file = path / JSON_NAME if path.is_dir() else path
        try:
            reports[path] = reading.read_typed(file, Report, "name another one")
        except FileNotFoundError as error:
            what = f"no {JSON_NAME}; a run (qtool ptq, qat, ...) or qtool eval -o writes one"
            faults.append(f"{path} has {what}" if path.is_dir() else f"{path} cannot be read: {error.strerror}")
        except InputError as error:
            faults.append(f"{file} is not a report of a qtool run: it {str(error).removeprefix(f'{file} ')}")
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            faults.append(f"{path} is given {count} times")
    if not paths:
        faults.append("no run was given; name folders with a report.json")
    if faults:
        raise InputError(listing("these runs cannot be compared:", faults))
    return comparison(dict(zip(_names(list(reports)), reports.values(), strict=True)))


def _names(paths: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different, to name the runs by."""
    parts = [(path if path.is_dir() or path.name != JSON_NAME else path.parent).resolve().parts for path in paths]
    depth = next(
        (depth for depth in range(1, max(map(len, parts))) if len({p[-depth:] for p in parts}) == len(parts)), None
    )
    return [
        printable(str(path) if depth is None else "/".join(p[-depth:])) for path, p in zip(paths, parts, strict=True)
    ]
