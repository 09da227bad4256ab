"""What the cells of a sweep came to, and means over cells that differ only in a seed or the like."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from pydantic import Field

from qtool.reports.bench_report import BenchReport
from qtool.reports.records import Number, Published, Record, TaskResult
from qtool.reports.text import metric_name

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


class CellGroup(Record):
    """Cells that differ only in what a sweep takes means over."""

    columns: dict[str, str]
    num_cells: int = Field(description="Cells that are done, of which the means are.")
    num_planned: int
    bits_per_weight: float | None = None
    quantized_bytes: float | None = None
    seconds: Mean | None = Field(None, description="Of quantization.")
    metrics: dict[str, Mean] = Field(default_factory=dict)


def groups(cells: Sequence[CellResult], over: Sequence[str]) -> tuple[CellGroup, ...]:
    """Means and standard deviations of the cells that are alike in all columns but ``over``, in the order of cells."""
    alike: dict[tuple[tuple[str, str], ...], list[CellResult]] = {}
    for cell in cells:
        rest = tuple((name, label) for name, label in cell.columns.items() if name not in over)
        alike.setdefault(rest, []).append(cell)
    return tuple(_group(dict(columns), members) for columns, members in alike.items())


def _group(columns: dict[str, str], members: Sequence[CellResult]) -> CellGroup:
    done = [cell for cell in members if cell.status == "done"]
    values: dict[str, list[float]] = {}
    for name, row in (named for cell in done for named in cell.named()):
        if row.value is not None:
            values.setdefault(name, []).append(row.value)
    seconds = [cell.seconds["quantize"] for cell in done if "quantize" in cell.seconds]
    bits = [cell.bits_per_weight for cell in done if cell.bits_per_weight is not None]
    sizes = [cell.quantized_bytes for cell in done if cell.quantized_bytes is not None]
    return CellGroup(
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
