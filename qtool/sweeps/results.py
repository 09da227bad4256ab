"""The results of a sweep's cells, and means over cells that differ only in a seed or the like."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from pydantic import Field

from qtool.config.sections import PERCENTILES
from qtool.reports.bench_report import BenchReport
from qtool.reports.records import Number, Published, Record, TaskResult
from qtool.reports.text import metric_name

SHOWN_PERCENTILE = "99.9th percentile"  # the percentile of KL divergence that tables of sweeps have room for
Status = Literal["done", "failed", "not run"]


class CellResult(Record):
    """The settings and results of one cell."""

    name: str = Field(description="Name of the cell's folder.")
    columns: dict[str, str] = Field(description="Label of the cell on each axis.")
    status: Status
    reason: str = Field("", description="Why the cell failed or was not run.")
    model: str = Field(description="The float model.")
    method: str
    label: str | None = Field(None, description="Short name of the quantization grid, e.g. w4g128.")
    bits_per_weight: float | None = Field(None, description="Mean of quantized linears, with scales and zero points.")
    file_bits_per_weight: float | None = Field(
        None, description="Bits of all weight files for each weight of the float model."
    )
    float_bytes: int | None = Field(None, description="Size of the float model's weights.")
    quantized_bytes: int | None = Field(None, description="Size of the quantized model's weights on disk.")
    seconds: dict[str, float] = Field(default_factory=dict, description="Wall time by phase.")
    results: tuple[TaskResult, ...] = ()
    expected: tuple[Published, ...] = Field((), description="Published numbers that the recipe names, beside ours.")
    bench: BenchReport | None = Field(None, description="Report of qtool bench; null: not measured.")
    dtype: str | None = None
    device: str | None = None
    machine: str | None = Field(None, description="Processor and threads that quantized the cell.")

    def shown(self) -> list[TaskResult]:
        """Return the results that tables show; of the percentiles of KL divergence, ``SHOWN_PERCENTILE`` alone."""
        left_out = PERCENTILES.keys() - {SHOWN_PERCENTILE}
        return [row for row in self.results if not row.detail and row.metric not in left_out]

    def named(self) -> list[tuple[str, TaskResult]]:
        """Return the results that tables show, as pairs of metric name and result."""
        return [(metric_name(row.task, row.metric), row) for row in self.shown()]


class Mean(Record):
    """Mean and standard deviation of a number over several cells."""

    mean: Number
    deviation: Number | None = Field(None, description="Standard deviation of the sample; null: only one value.")


class CellGroup(Record):
    """Means over cells that differ only in the columns of ``over``."""

    columns: dict[str, str]
    num_cells: int = Field(description="Number of cells that are done; the means are over these.")
    num_planned: int = Field(description="Number of cells, done or not.")
    bits_per_weight: float | None = None
    file_bits_per_weight: float | None = None
    quantized_bytes: float | None = None
    seconds: Mean | None = Field(None, description="Wall time of quantization.")
    metrics: dict[str, Mean] = Field(default_factory=dict)


def groups(cells: Sequence[CellResult], over: Sequence[str]) -> tuple[CellGroup, ...]:
    """Return means and deviations over the cells that are equal in all columns but ``over``, in the order of cells."""
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
    whole = [cell.file_bits_per_weight for cell in done if cell.file_bits_per_weight is not None]
    sizes = [cell.quantized_bytes for cell in done if cell.quantized_bytes is not None]
    return CellGroup(
        columns=columns,
        num_cells=len(done),
        num_planned=len(members),
        bits_per_weight=fmean(bits) if bits else None,
        file_bits_per_weight=fmean(whole) if whole else None,
        quantized_bytes=fmean(sizes) if sizes else None,
        seconds=_mean(seconds) if seconds else None,
        metrics={name: _mean(found) for name, found in values.items()},
    )


def _mean(values: Sequence[float]) -> Mean:
    finite = all(map(math.isfinite, values))
    return Mean(mean=fmean(values), deviation=stdev(values) if len(values) > 1 and finite else None)
