"""The result of a sweep: the schema of ``sweep.json``, and the same as Markdown and as tables for a terminal."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from pydantic import Field

from qtool.reports.bench_report import FAST, PREFILL, BenchReport, decode
from qtool.reports.document import Document, Printable, Table
from qtool.reports.records import Number, Published, Record, TaskResult
from qtool.reports.text import metric_name, note_of, number
from qtool.system.environment import environment

JSON_NAME = "sweep.json"
MARKDOWN_NAME = "sweep.md"
Status = Literal["done", "failed", "not run"]


class CellResult(Record):
    """One cell: what it was, what it came to, and how good it is."""

    name: str = Field(description="Of its folder.")
    columns: dict[str, str] = Field(description="Its label on each axis.")
    status: Status
    reason: str = Field("", description="Why it failed or was not run.")
    model: str = Field(description="The float model.")
    method: str
    label: str | None = Field(None, description="Grid in short, e.g. w4g128.")
    bits_per_weight: float | None = Field(None, description="Of the quantized linears, scales and zero points counted.")
    float_bytes: int | None = Field(None, description="Weights of the float model.")
    quantized_bytes: int | None = Field(None, description="Weights of the quantized model on disk.")
    seconds: dict[str, float] = Field(default_factory=dict, description="Wall time by phase.")
    results: tuple[TaskResult, ...] = ()
    expected: tuple[Published, ...] = Field((), description="Published numbers that the recipe names, and ours.")
    bench: BenchReport | None = Field(None, description="null: not measured.")
    dtype: str | None = None
    device: str | None = None
    machine: str | None = Field(None, description="Processor and threads of the quantization.")

    def shown(self) -> list[TaskResult]:
        """The results that tables have."""
        return [row for row in self.results if not row.detail]

    def named(self) -> list[tuple[str, TaskResult]]:
        """Those results, each after the name of its metric."""
        return [(metric_name(row.task, row.metric), row) for row in self.shown()]


class Mean(Record):
    """A number over several cells."""

    mean: Number
    deviation: Number | None = Field(None, description="Standard deviation of a sample; null: of one value.")


class Group(Record):
    """Cells that differ only in what a sweep takes means over."""

    columns: dict[str, str]
    num_cells: int = Field(description="Cells that are done, of which the means are.")
    num_planned: int
    bits_per_weight: float | None = None
    quantized_bytes: float | None = None
    seconds: Mean | None = Field(None, description="Of quantization.")
    metrics: dict[str, Mean] = Field(default_factory=dict)


def groups(cells: Sequence[CellResult], over: Sequence[str]) -> tuple[Group, ...]:
    """Means and standard deviations of the cells that are alike in all columns but ``over``, in the order of cells."""
    alike: dict[tuple[tuple[str, str], ...], list[CellResult]] = {}
    for cell in cells:
        rest = tuple((name, label) for name, label in cell.columns.items() if name not in over)
        alike.setdefault(rest, []).append(cell)
    return tuple(_group(dict(columns), members) for columns, members in alike.items())


def _group(columns: dict[str, str], members: Sequence[CellResult]) -> Group:
    done = [cell for cell in members if cell.status == "done"]
    values: dict[str, list[float]] = {}
    for name, row in (named for cell in done for named in cell.named()):
        if row.value is not None:
            values.setdefault(name, []).append(row.value)
    seconds = [cell.seconds["quantize"] for cell in done if "quantize" in cell.seconds]
    bits = [cell.bits_per_weight for cell in done if cell.bits_per_weight is not None]
    sizes = [cell.quantized_bytes for cell in done if cell.quantized_bytes is not None]
    return Group(
        columns=columns,
        num_cells=len(done),
        num_planned=len(members),
        bits_per_weight=fmean(bits) if bits else None,
        quantized_bytes=fmean(sizes) if sizes else None,
        seconds=_mean(seconds) if seconds else None,
        metrics={name: _mean(found) for name, found in values.items()},
    )


def _mean(values: Sequence[float]) -> Mean:
    finite = all(map(math.isfinite, values))
    return Mean(mean=fmean(values), deviation=stdev(values) if len(values) > 1 and finite else None)


class SweepReport(Record, Printable):
    """All cells of a sweep side by side."""

    name: str
    title: str = ""
    over: tuple[str, ...] = Field((), description="Columns that means are taken over.")
    cells: tuple[CellResult, ...]
    groups: tuple[Group, ...] = Field((), description="Means over those columns.")
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

    def cell_rows(self) -> list[list[str]]:
        """A header, a row for each float model that was measured beside, and a row for each cell."""
        benches = any(cell.bench is not None for cell in self.cells)
        columns, metrics = self.columns(), self.metrics()
        header = [*map(_short, columns), *SIZES, *metrics, "quantize s", *(SPEEDS if benches else ())]
        complete = all(cell.status == "done" for cell in self.cells)
        rows = [header if complete else [*header, "status"]]
        for label, cell in self._floats():
            found = {name: number(row.float_value, row.float_stderr) for name, row in cell.named()}
            size = "" if cell.float_bytes is None else f"{cell.float_bytes / 1e6:.2f}"
            row = [label, *[""] * len(columns[1:]), "", size, *(found.get(name, "") for name in metrics)]
            rows.append([*row, *[""] * (len(rows[0]) - len(row))])
        for cell in self.cells:
            found = {name: _value(row) for name, row in cell.named()}
            row = [cell.columns.get(name, "") for name in columns]
            row += [*_sizes(cell.bits_per_weight, cell.quantized_bytes), *(found.get(name, "") for name in metrics)]
            row += [_seconds(cell.seconds.get("quantize")), *(_speeds(cell.bench) if benches else ())]
            rows.append(row if complete else [*row, self._status(cell)])
        return rows

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

    def group_rows(self) -> list[list[str]]:
        """A header and a row for each group of cells; no rows where no means were asked for."""
        if not self.over:
            return []
        columns, metrics = [name for name in self.columns() if name not in self.over], self.metrics()
        rows = [[*map(_short, columns), "cells", *SIZES, *metrics, "quantize s"]]
        for group in self.groups:
            few = "" if group.num_cells == group.num_planned else f" of {group.num_planned}"
            row = [*(group.columns.get(name, "") for name in columns), f"{group.num_cells}{few}"]
            row += _sizes(group.bits_per_weight, group.quantized_bytes)
            means = [group.metrics.get(name) for name in metrics]
            row += ["" if mean is None else number(mean.mean, mean.deviation) for mean in means]
            rows.append([*row, _seconds(group.seconds.mean if group.seconds else None)])
        return rows

    def published_rows(self) -> list[list[str]]:
        """A header and a row for each published number; no rows where there is none."""
        rows = []
        for cell in self.cells:
            for each in cell.expected:
                name = f"{each.task} {each.metric}"
                ours = number(each.measured, each.stderr) or (cell.status if cell.status != "done" else "")
                difference = number(each.difference, None, sign="+")
                source = "; ".join(part for part in (each.source, each.note if cell.status == "done" else "") if part)
                labels = [cell.columns.get(column, "") for column in self.columns()]
                rows.append([*labels, name, f"{each.value:.6g}", ours, difference, source])
        header = [*map(_short, self.columns()), "metric", "published", "ours", "difference", "source"]
        return [header, *rows] if rows else []

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
        means, published = self.group_rows(), self.published_rows()
        titles = (f"Over {', '.join(self.over)}", "Cells" if means or published else "", "Published numbers")
        tables = [
            Table(header, rows, "l" * (left := len(self.columns())) + "r" * (len(header) - left), title)
            for title, (header, *rows) in zip(titles, (means or [[]], self.cell_rows(), published or [[]]), strict=True)
            if header
        ]
        tables[-1] = replace(tables[-1], footnotes=[_one_line(reason) for reason in self.reasons()])
        return Document(
            title=self.title or self.name,
            name=self.name if self.title else "",
            status=self.counts(),
            tables=tables,
            notes=self.notes(),
            environment=self.environment,
        )

    def write(self, folder: Path) -> None:
        """Write ``sweep.json`` and ``sweep.md`` into ``folder``, each whole or not at all."""
        for name, text in ((JSON_NAME, self.model_dump_json(indent=2) + "\n"), (MARKDOWN_NAME, self.markdown())):
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


SIZES = ("bits/weight", "MB")
SPEEDS = ("decode tokens/s", "prefill tokens/s", "decode J/token")


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
