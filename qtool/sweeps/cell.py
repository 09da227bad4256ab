"""A cell of a sweep on disk: the work that remains for it, and its result.

A cell is done, and does not run again, if its folder was made from the same lock (recipe, model files, versions) and
its report is of the same evaluation. The processor and the number of threads are not compared, so that one table can
hold cells from several machines; a note then says so. If only the evaluation is missing or differs, the cell is only
evaluated. The report belongs to the evaluation in ``OUT/<cell>.yaml``: it is deleted before that evaluation changes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, model_validator

from qtool.checkpoints.files import write_json
from qtool.checkpoints.output_folder import partial_of
from qtool.config import recipe
from qtool.config.sweep import BenchConfig
from qtool.config.yaml_loader import dump
from qtool.pipelines.lock import differences
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.pipelines.run_state import read_lock
from qtool.reports.bench_report import DENSE, FAST, PREFILL, BenchReport, decode
from qtool.reports.records import Lock, beside_published
from qtool.reports.report import JSON_NAME as REPORT
from qtool.reports.report import Report
from qtool.sweeps.grid import CellRecipe
from qtool.sweeps.results import CellResult
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.system.paths import path_text
from qtool.system.reading import M, read_typed
from qtool.system.writing import write_text

BENCH = "bench.json"
MACHINE = ("processor", "threads", "processes")  # keys of a lock that describe the machine
Todo = Literal["run", "evaluate", "nothing"]
QTOOL = [sys.executable, "-m", "qtool"]


class KeptBench(BaseModel):
    """The content of ``bench.json``: the speeds of a cell, and the options they were measured with."""

    plan: BenchConfig
    report: BenchReport

    @model_validator(mode="after")
    def _has_what_tables_show(self) -> Self:
        speeds = {variant.name: variant.speeds for variant in self.report.variants}
        if not all(measure in speeds.get(name, {}) for name in (DENSE, FAST) for measure in (decode(1), PREFILL)):
            raise ValueError(f"report has no speeds of {DENSE} and {FAST}")
        return self


@dataclass
class Cell:
    """State of one cell: its remaining work (``todo``), and why it has no result (``reason``, empty if it has one)."""

    definition: CellRecipe
    out: Path
    todo: Todo = "nothing"
    starts_over: bool = False
    failed: bool = False
    reason: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the cell's checkpoint and report."""
        return self.out / self.definition.name

    @property
    def file(self) -> Path:
        """The file of the cell's recipe."""
        return self.out / f"{self.definition.name}.yaml"

    @property
    def log(self) -> Path:
        """The file that gets the standard error of the cell's process."""
        return self.out / f"{self.definition.name}.log"

    def command(self) -> list[str]:
        """Return the command that does the remaining work."""
        if self.todo == "evaluate":
            return [*QTOOL, "eval", path_text(self.file), "--output", path_text(self.folder), "--json"]
        options = [*(["--overwrite"] if self.folder.exists() else []), *(["--fresh"] if self.starts_over else [])]
        return [*QTOOL, self.definition.command, path_text(self.file), "--json", *options]


def todo(cell: Cell, lock: Lock, bench: BenchConfig | None) -> Todo:
    """Return the remaining work of a cell whose result would have ``lock``."""
    manifest = _manifest(cell)
    if manifest is None or differences(manifest.lock, lock, MACHINE):
        return "run"
    has_weights = any(cell.folder.glob("*.safetensors"))
    if bench is not None and not has_weights and benched(cell, bench) is None:
        return "run"
    if read_lock(partial_of(cell.folder)) is not None:
        return "run"  # the checkpoint is complete, but its run is not: its command goes on
    if _report(cell) is not None and _evaluation(cell) == cell.definition.recipe.eval:
        return "nothing"
    return "evaluate" if has_weights and cell.definition.recipe.eval is not None else "run"


def _manifest(cell: Cell) -> Manifest | None:
    """Return the manifest of a cell's checkpoint; ``None`` if it has none, or a damaged one, which a note says."""
    try:
        return read_manifest(cell.folder)
    except InputError as error:
        progress.note(f"{cell.definition.name}: {error}")
        return None


def begun_by_another(cell: Cell, lock: Lock, launcher: str) -> bool:
    """Return whether an interrupted run of the cell had another lock, so that the cell starts over."""
    before = read_lock(partial_of(cell.folder))
    if before is None:
        return False
    changes = differences(before, lock, () if launcher == "local" else MACHINE)
    if changes:
        progress.note(f"{cell.definition.name} starts over, because the interrupted run differs: {'; '.join(changes)}")
    return bool(changes)


def write_recipe(cell: Cell) -> None:
    """Write the recipe that the cell's command reads; delete a report of another evaluation first."""
    if _evaluation(cell) != cell.definition.recipe.eval:
        (cell.folder / REPORT).unlink(missing_ok=True)
    head = f"# Cell {cell.definition.name} of a sweep.\n#   qtool {cell.definition.command} {cell.file}\n\n"
    write_text(cell.file, head + dump(cell.definition.raw))


def _evaluation(cell: Cell) -> Any:
    """Return the evaluation in a cell's recipe file; ``False`` if there is no such file."""
    try:
        return recipe.load(path_text(cell.file)).eval
    except InputError:
        return False


def drop_weights(cell: Cell) -> None:
    """Delete the weights of a cell; its reports and manifest stay."""
    for file in cell.folder.glob("*.safetensors*"):
        file.unlink()


def result(cell: Cell) -> CellResult:
    """Return the result of a cell for the table."""
    made = cell.definition.recipe
    known: dict[str, Any] = {
        "name": cell.definition.name,
        "columns": cell.definition.columns,
        "model": made.model.path,
        "method": made.method.name,
    }
    manifest, report = _manifest(cell), _report(cell)
    if cell.reason or manifest is None or report is None:
        status = "failed" if cell.failed else "not run"
        reason = cell.reason or f"{cell.folder} has no report"
        return CellResult(**known, status=status, reason=reason, expected=beside_published(made.expected, ()))
    return CellResult(
        **known,
        status="done",
        label=manifest.label,
        bits_per_weight=manifest.bits_per_weight,
        file_bits_per_weight=report.file_bits_per_weight,
        float_bytes=manifest.float_bytes,
        quantized_bytes=manifest.quantized_bytes,
        seconds=report.seconds | manifest.seconds,
        results=tuple(row.model_copy(update={"windows": ()}) for row in report.results),
        expected=beside_published(made.expected, report.results),
        bench=benched(cell, None),
        dtype=report.dtype,
        device=report.device,
        machine=f"{manifest.lock.processor}, {manifest.lock.threads} threads",
    )


def _report(cell: Cell) -> Report | None:
    """Return the report of a cell; ``None`` if it is missing or damaged."""
    return _kept(cell.folder / REPORT, Report)


def keep_bench(cell: Cell, bench: BenchConfig, output: str) -> None:
    """Save the report that ``qtool bench --json`` printed."""
    report = json.loads(output.strip().splitlines()[-1])["report"]
    write_json(cell.folder / BENCH, {"plan": bench.model_dump(), "report": report})


def benched(cell: Cell, bench: BenchConfig | None) -> BenchReport | None:
    """Return the speeds of a cell; ``None`` if not measured, or not with the options ``bench``, if these are given."""
    found = _kept(cell.folder / BENCH, KeptBench)
    return found.report if found is not None and bench in (None, found.plan) else None


def _kept(file: Path, kind: type[M]) -> M | None:
    """Return what a cell kept in a file; ``None`` if it is missing, or damaged, which a note says."""
    try:
        return read_typed(file, kind, "it is made again")
    except FileNotFoundError:
        return None
    except InputError as error:
        progress.note(str(error))
        return None
