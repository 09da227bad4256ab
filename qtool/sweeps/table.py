"""The report of a sweep: the schema of ``sweep.json``, and its tables."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from qtool.reports.bench_report import FAST, PREFILL, BenchReport, decode
from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Record, TaskResult
from qtool.reports.text import bits, note_of, number
from qtool.sweeps.results import CellGroup, CellResult
from qtool.system.environment import environment
from qtool.system.units import duration, file_size
from qtool.system.writing import write_text

JSON_NAME = "sweep.json"
MARKDOWN_NAME = "sweep.md"
SPEEDS = ("decode tokens/s", "prefill tokens/s", "decode J/token")


class SweepReport(Record, Printable):
    """The results of all cells of a sweep."""

    name: str
    title: str = ""
    over: tuple[str, ...] = Field((), description="Columns over which means are taken.")
    cells: tuple[CellResult, ...]
    groups: tuple[CellGroup, ...] = Field((), description="Means over these columns.")
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def counts(self) -> str:
        """Return for instance ``3 of 4 cells done, 1 failed``."""
        count = {status: sum(cell.status == status for cell in self.cells) for status in ("done", "failed", "not run")}
        others = [f"{number} {status}" for status, number in count.items() if number and status != "done"]
        return ", ".join([f"{count['done']} of {len(self.cells)} cells done", *others])

    def metrics(self) -> list[str]:
        """Return the names of all metrics."""
        return list(dict.fromkeys(name for cell in self.cells for name, _ in cell.named()))

    def sizes(self) -> list[str]:
        """Return the names of the columns of sizes; the bits per weight of the whole file only where they are known."""
        known = any(cell.file_bits_per_weight is not None for cell in self.cells)
        return ["bits/weight", *(["of file"] if known else []), "size"]

    def _sizes(self, of: CellResult | CellGroup) -> list[str]:
        """Return a cell for each of ``sizes()``."""
        whole = [bits(of.file_bits_per_weight)] if len(self.sizes()) > 2 else []
        return [bits(of.bits_per_weight), *whole, _size(of.quantized_bytes)]

    def columns(self) -> list[str]:
        """Return the names of the columns that vary."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.columns))

    def reasons(self) -> list[str]:
        """Return the reasons why cells are not done, each once."""
        return list(dict.fromkeys(cell.reason for cell in self.cells if cell.status != "done"))

    def cell_table(self) -> Table:
        """Return the table with a row for each float model that was measured, then one for each cell."""
        benches = any(cell.bench is not None for cell in self.cells)
        complete = all(cell.status == "done" for cell in self.cells)
        columns, metrics = self.columns(), self.metrics()
        right = [*self.sizes(), *metrics, "quantize", *(SPEEDS if benches else ())]
        right += [] if complete else ["status"]
        rows = []
        for label, cell in self._floats():
            found = {name: number(row.float_value, row.float_stderr) for name, row in cell.named()}
            row = [label, *[""] * len([*columns[1:], *self.sizes()[1:]]), _size(cell.float_bytes)]
            row += [found.get(name, "") for name in metrics]
            rows.append([*row, *[""] * (len(columns) + len(right) - len(row))])
        for cell in self.cells:
            found = {name: _value(row) for name, row in cell.named()}
            row = [cell.columns.get(name, "") for name in columns]
            row += [*self._sizes(cell), *(found.get(name, "") for name in metrics)]
            row += [_seconds(cell.seconds.get("quantize")), *(_speeds(cell.bench) if benches else ())]
            rows.append(row if complete else [*row, self._status(cell)])
        return _table("Cells", columns, right, rows)

    def _floats(self) -> list[tuple[str, CellResult]]:
        """Return, for each float model, a name for its row and a sweep cell with its numbers.

        A float model has several rows if it was measured with different results.
        """
        found: dict[tuple[str, tuple[tuple[str, float | None], ...]], CellResult] = {}
        for cell in self.cells:
            numbers = tuple((name, row.float_value) for name, row in cell.named())
            if any(value is not None for _, value in numbers):
                found.setdefault((cell.model, numbers), cell)
        models = [model for model, _ in found]
        labels = ["float" if len(set(models)) == 1 else f"float {model}" for model in models]
        alone = [models.count(model) == 1 for model in models]
        cells = list(found.values())
        return [
            (label if only else f"{label}, as beside {cell.name}", cell)
            for label, cell, only in zip(labels, cells, alone, strict=True)
        ]

    def _status(self, cell: CellResult) -> str:
        return cell.status if cell.status == "done" else f"{cell.status} [{self.reasons().index(cell.reason) + 1}]"

    def mean_table(self) -> Table:
        """Return the table with a row for each group of cells; no rows if the sweep takes no means."""
        columns, metrics = [name for name in self.columns() if name not in self.over], self.metrics()
        rows = []
        for group in self.groups:
            few = "" if group.num_cells == group.num_planned else f" of {group.num_planned}"
            row = [*(group.columns.get(name, "") for name in columns), f"{group.num_cells}{few}"]
            row += self._sizes(group)
            means = [group.metrics.get(name) for name in metrics]
            row += ["" if mean is None else number(mean.mean, mean.deviation) for mean in means]
            rows.append([*row, _seconds(group.seconds.mean if group.seconds else None)])
        return _table(f"Over {', '.join(self.over)}", [*columns, "cells"], [*self.sizes(), *metrics, "quantize"], rows)

    def published_table(self) -> Table:
        """Return the table with a row for each published number."""
        rows = []
        for cell in self.cells:
            for each in cell.expected:
                name = f"{each.task} {each.metric}"
                ours = number(each.measured, each.stderr) or (cell.status if cell.status != "done" else "")
                difference = number(each.difference, None, sign="+")
                source = "; ".join(part for part in (each.source, each.note if cell.status == "done" else "") if part)
                labels = [cell.columns.get(column, "") for column in self.columns()]
                rows.append([*labels, name, f"{each.value:.6g}", ours, difference, source])
        right = ["metric", "published", "ours", "difference", "source"]
        return _table("Published numbers", self.columns(), right, rows)

    def notes(self) -> list[str]:
        """Return the notes under the tables."""
        lines = []
        if any(row.stderr is not None for cell in self.cells for row in cell.shown()):
            lines.append("± in a row of one cell is the standard error over the evaluation text")
        if self.over:
            lines.append(f"± in a row of several cells is the standard deviation over {', '.join(self.over)}")
        lines += self._row_notes()
        benches = [cell.bench for cell in self.cells if cell.bench is not None]
        if benches:
            lines.append(f"speeds: {benches[0].dtype} on {benches[0].device}; x is relative to dense weights")
            if not any(_joules(bench) for bench in benches):
                lines.append(f"energy {benches[0].energy}")
        machines = list(dict.fromkeys(cell.machine for cell in self.cells if cell.machine))
        if len(machines) > 1:
            lines.append(f"cells ran on different machines: {'; '.join(machines)}")
        return lines

    def _row_notes(self) -> list[str]:
        """Return the notes of results, each once, after its metrics, and after its cells if not of all cells."""
        found: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            for metric, row in cell.named():
                if note := note_of(row):
                    found.setdefault((metric, note), []).append(cell.name)
        done = sum(cell.status == "done" for cell in self.cells)
        grouped: dict[tuple[str, str], list[str]] = {}
        for (metric, note), names in found.items():
            some = "" if len(names) == done else f" [{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}]"
            grouped.setdefault((note, some), []).append(metric)
        return [f"{', '.join(metrics)}{some}: {note}" for (note, some), metrics in grouped.items()]

    def document(self) -> Document:
        """Return the tables of means, cells and published numbers, with the reasons why cells are not done."""
        tables = [table for table in (self.mean_table(), self.cell_table(), self.published_table()) if table.rows]
        if len(tables) == 1:
            tables = [replace(tables[0], title="")]
        footnotes = [_one_line(reason) for reason in self.reasons()]
        return Document(
            title=self.title or self.name,
            name=self.name if self.title else "",
            status=self.counts(),
            tables=[*tables[:-1], *(replace(table, footnotes=footnotes) for table in tables[-1:])],
            notes=self.notes(),
            environment=self.environment,
        )

    def write(self, folder: Path) -> None:
        """Write ``sweep.json`` and ``sweep.md`` into ``folder``."""
        for name, text in ((JSON_NAME, self.json_text()), (MARKDOWN_NAME, self.markdown())):
            write_text(folder / name, text)


def _table(title: str, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with columns of labels, aligned left, and columns of numbers, aligned right."""
    align = "l" * len(left) + "r" * len(right)
    return Table([*map(_short, left), *right], rows, align, title, keys=len(left))


def _seconds(value: float | None) -> str:
    return "" if value is None else duration(value)


def _size(num_bytes: float | None) -> str:
    return "" if num_bytes is None else file_size(num_bytes)


def _value(row: TaskResult) -> str:
    return "not measured" if row.value is None else number(row.value, row.stderr)


def _speeds(bench: BenchReport | None) -> list[str]:
    """Return a cell for each of ``SPEEDS``, for the fast variant of the packed weights."""
    if bench is None:
        return [""] * len(SPEEDS)
    cells = []
    for measure in (decode(1), PREFILL):
        found = bench.variant(FAST).speeds[measure].tokens_per_second
        cells.append(f"{number(found, None)} ({bench.ratio(FAST, measure):.2f} x)")
    joules = _joules(bench)
    return [*cells, "not measured" if joules is None else f"{joules:.3g}"]


def _joules(bench: BenchReport) -> float | None:
    return bench.variant(FAST).speeds[decode(1)].joules_per_token


def _short(column: str) -> str:
    """Return the last part of a dotted key, or the section for a key such as ``method.name``."""
    first, _, last = column.rpartition(".")
    return first if last == "name" and first else last


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
