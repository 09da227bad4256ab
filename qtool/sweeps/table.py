"""The result of a sweep: the schema of ``sweep.json``, and the same as Markdown and as tables for a terminal."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from qtool.reports.bench_report import FAST, PREFILL, BenchReport, decode
from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Record, TaskResult
from qtool.reports.text import note_of, number
from qtool.sweeps.results import CellGroup, CellResult
from qtool.system.environment import environment

JSON_NAME = "sweep.json"
MARKDOWN_NAME = "sweep.md"
SIZES = ("bits/weight", "MB")
SPEEDS = ("decode tokens/s", "prefill tokens/s", "decode J/token")


class SweepReport(Record, Printable):
    """All cells of a sweep side by side."""

    name: str
    title: str = ""
    over: tuple[str, ...] = Field((), description="Columns that means are taken over.")
    cells: tuple[CellResult, ...]
    groups: tuple[CellGroup, ...] = Field((), description="Means over those columns.")
    environment: dict[str, str] = Field(default_factory=lambda: environment())
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def counts(self) -> str:
        """``3 of 4 cells done, 1 failed``."""
        count = {status: sum(cell.status == status for cell in self.cells) for status in ("done", "failed", "not run")}
        others = [f"{number} {status}" for status, number in count.items() if number and status != "done"]
        return ", ".join([f"{count['done']} of {len(self.cells)} cells done", *others])

    def metrics(self) -> list[str]:
        """Every metric that a cell has."""
        return list(dict.fromkeys(name for cell in self.cells for name, _ in cell.named()))

    def columns(self) -> list[str]:
        """What varies."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.columns))

    def reasons(self) -> list[str]:
        """Why cells are not done, each reason once."""
        return list(dict.fromkeys(cell.reason for cell in self.cells if cell.status != "done"))

    def cell_table(self) -> Table:
        """A row for each float model that was measured beside, and a row for each cell."""
        benches = any(cell.bench is not None for cell in self.cells)
        complete = all(cell.status == "done" for cell in self.cells)
        columns, metrics = self.columns(), self.metrics()
        right = [*SIZES, *metrics, "quantize s", *(SPEEDS if benches else ()), *(() if complete else ("status",))]
        rows = []
        for label, cell in self._floats():
            found = {name: number(row.float_value, row.float_stderr) for name, row in cell.named()}
            size = "" if cell.float_bytes is None else f"{cell.float_bytes / 1e6:.2f}"
            row = [label, *[""] * len(columns[1:]), "", size, *(found.get(name, "") for name in metrics)]
            rows.append([*row, *[""] * (len(columns) + len(right) - len(row))])
        for cell in self.cells:
            found = {name: _value(row) for name, row in cell.named()}
            row = [cell.columns.get(name, "") for name in columns]
            row += [*_sizes(cell.bits_per_weight, cell.quantized_bytes), *(found.get(name, "") for name in metrics)]
            row += [_seconds(cell.seconds.get("quantize")), *(_speeds(cell.bench) if benches else ())]
            rows.append(row if complete else [*row, self._status(cell)])
        return _table("Cells", columns, right, rows)

    def _floats(self) -> list[tuple[str, CellResult]]:
        """A cell for each float model, or for each set of numbers of one, with a name for its row."""
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
        """A row for each group of cells; no rows where no means were asked for."""
        columns, metrics = [name for name in self.columns() if name not in self.over], self.metrics()
        rows = []
        for group in self.groups:
            few = "" if group.num_cells == group.num_planned else f" of {group.num_planned}"
            row = [*(group.columns.get(name, "") for name in columns), f"{group.num_cells}{few}"]
            row += _sizes(group.bits_per_weight, group.quantized_bytes)
            means = [group.metrics.get(name) for name in metrics]
            row += ["" if mean is None else number(mean.mean, mean.deviation) for mean in means]
            rows.append([*row, _seconds(group.seconds.mean if group.seconds else None)])
        return _table(f"Over {', '.join(self.over)}", [*columns, "cells"], [*SIZES, *metrics, "quantize s"], rows)

    def published_table(self) -> Table:
        """A row for each published number."""
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
        """What a reader must know to compare these numbers with others."""
        lines = []
        if any(row.stderr is not None for cell in self.cells for row in cell.shown()):
            lines.append("± in a row of one cell is the standard error over the evaluation text")
        if self.over:
            lines.append(f"± in a row of several cells is the standard deviation over {', '.join(self.over)}")
        lines += self._row_notes()
        benches = [cell.bench for cell in self.cells if cell.bench is not None]
        if benches:
            lines.append(f"speeds: {benches[0].dtype} on {benches[0].device}; x is times the same weights held densely")
            if not any(_joules(bench) for bench in benches):
                lines.append(f"energy {benches[0].energy}")
        machines = list(dict.fromkeys(cell.machine for cell in self.cells if cell.machine))
        if len(machines) > 1:
            lines.append(f"cells ran on different machines: {'; '.join(machines)}")
        return lines

    def _row_notes(self) -> list[str]:
        """Notes of the results, each once, after the metrics that it is of, and the cells if it is not of all."""
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
        """Means, cells and published numbers, and why cells have none."""
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
        """Write ``sweep.json`` and ``sweep.md`` into ``folder``, each whole or not at all."""
        for name, text in ((JSON_NAME, self.model_dump_json(indent=2) + "\n"), (MARKDOWN_NAME, self.markdown())):
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


def _table(title: str, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of columns that vary, aligned left, and columns of numbers, aligned right."""
    return Table([*map(_short, left), *right], rows, "l" * len(left) + "r" * len(right), title)


def _sizes(bits: float | None, size: float | None) -> list[str]:
    return ["" if bits is None else f"{bits:.3f}", "" if size is None else f"{size / 1e6:.2f}"]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _value(row: TaskResult) -> str:
    return "not measured" if row.value is None else number(row.value, row.stderr)


def _speeds(bench: BenchReport | None) -> list[str]:
    """A cell for each of ``SPEEDS``, of packed weights with this machine's kernels."""
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
    """The last part of a key, or the section's name for ``method.name``."""
    first, _, last = column.rpartition(".")
    return first if last == "name" and first else last


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
