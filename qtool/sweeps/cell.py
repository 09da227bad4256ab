"""A cell of a sweep on the disk: what is left of it to do, and what it came to.

A cell is done, and not run again, when its folder was made from the same lock (``run.lock_of``: recipe, model files,
versions) and its report is of the same evaluation. The processor and the number of threads are not compared, so that
cells of several machines can stand in one table, which then says so. Where only the evaluation is missing or another,
nothing is quantized again. A report is of the evaluation in ``OUT/<cell>.yaml``: it is removed before that changes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import MANIFEST
from qtool.config import recipe
from qtool.config.sweep import BenchConfig
from qtool.pipelines.lock import differences
from qtool.reports.bench_report import BenchReport
from qtool.reports.records import compare
from qtool.reports.report import JSON_NAME as REPORT
from qtool.reports.report import Report
from qtool.sweeps.grid import CellRecipe
from qtool.sweeps.results import CellResult
from qtool.system import progress
from qtool.system.errors import InputError

BENCH = "bench.json"
MACHINE = ("processor", "threads", "processes")  # of a lock: where it ran
Todo = Literal["run", "evaluate", "nothing"]
QTOOL = [sys.executable, "-m", "qtool"]


@dataclass
class Cell:
    """A cell under way: what is left of it, and why it has no result, which is nothing where it has one."""

    plan: CellRecipe
    out: Path
    todo: Todo = "nothing"
    starts_over: bool = False
    failed: bool = False
    reason: str = ""

    @property
    def folder(self) -> Path:
        """Its checkpoint and report."""
        return self.out / self.plan.name

    @property
    def file(self) -> Path:
        """Its recipe."""
        return self.out / f"{self.plan.name}.yaml"

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.out / f"{self.plan.name}.log"

    def command(self) -> list[str]:
        """What does the rest of it."""
        if self.todo == "evaluate":
            return [*QTOOL, "eval", str(self.file), "--output", str(self.folder), "--json"]
        options = [*(["--overwrite"] if self.folder.exists() else []), *(["--fresh"] if self.starts_over else [])]
        return [*QTOOL, self.plan.command, str(self.file), "--json", *options]


def todo(cell: Cell, lock: dict[str, Any], bench: BenchConfig | None) -> Todo:
    """What is left of a cell whose result would have ``lock``."""
    manifest = _read(cell.folder / MANIFEST)
    if manifest is None or list(differences(_anywhere(manifest.get("lock") or {}), _anywhere(lock))):
        return "run"
    has_weights = any(cell.folder.glob("*.safetensors"))
    if bench is not None and not has_weights and benched(cell, bench) is None:
        return "run"
    if _report(cell) is not None and _evaluation(cell) == cell.plan.recipe.eval:
        return "nothing"
    return "evaluate" if has_weights and cell.plan.recipe.eval is not None else "run"


def _anywhere(lock: dict[str, Any]) -> dict[str, Any]:
    """A lock without the machine, as it is after it was written and read."""
    kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in lock.items() if key not in MACHINE}))
    return kept


def begun_by_another(cell: Cell, lock: dict[str, Any], launcher: str) -> bool:
    """Whether what is left of an interrupted run is of another lock, so that this one starts over."""
    before = _read(cell.out / f"{cell.plan.name}.partial" / "state" / "lock.json")
    if before is None:
        return False
    if launcher == "local":
        changes = list(differences(before, json.loads(json.dumps(lock))))
    else:
        changes = list(differences(_anywhere(before), _anywhere(lock)))
    if changes:
        progress.note(f"{cell.plan.name} starts over, for it is not what was begun: {'; '.join(changes)}")
    return bool(changes)


def write_recipe(cell: Cell) -> None:
    """Write what the cell's command reads."""
    if _evaluation(cell) != cell.plan.recipe.eval:
        (cell.folder / REPORT).unlink(missing_ok=True)
    head = f"# Cell {cell.plan.name} of a sweep.\n#   qtool {cell.plan.command} {cell.file}\n\n"
    cell.file.write_text(head + yaml.safe_dump(cell.plan.raw, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _evaluation(cell: Cell) -> Any:
    """The evaluation that a cell's file asks for; ``False`` where there is no such file."""
    try:
        return recipe.load(cell.file).eval
    except InputError:
        return False


def drop_weights(cell: Cell) -> None:
    """Leave only reports and manifest of a cell."""
    for file in cell.folder.glob("*.safetensors*"):
        file.unlink()


def result(cell: Cell) -> CellResult:
    """The cell's row of the table."""
    made = cell.plan.recipe
    known: dict[str, Any] = {
        "name": cell.plan.name,
        "columns": cell.plan.columns,
        "model": made.model.path,
        "method": made.method.name,
    }
    manifest, report = _read(cell.folder / MANIFEST), _report(cell)
    if cell.reason or manifest is None or report is None:
        status = "failed" if cell.failed else "not run"
        reason = cell.reason or f"{cell.folder} has no report"
        return CellResult(**known, status=status, reason=reason, expected=compare(made.expected, ()))
    lock = manifest["lock"]
    return CellResult(
        **known,
        status="done",
        **{key: manifest[key] for key in ("label", "bits_per_weight", "float_bytes", "quantized_bytes")},
        seconds=report.seconds | manifest["seconds"],
        results=report.results,
        expected=compare(made.expected, report.results),
        bench=benched(cell, None),
        dtype=report.dtype,
        device=report.device,
        machine=f"{lock['processor']}, {lock['threads']} threads",
    )


def _report(cell: Cell) -> Report | None:
    """The report of a cell; ``None`` where there is none, or not a whole one."""
    found = _read(cell.folder / REPORT)
    return None if found is None else Report.model_validate(found)


def keep_bench(cell: Cell, bench: BenchConfig, output: str) -> None:
    """Keep what ``qtool bench --json`` printed."""
    report = json.loads(output.strip().splitlines()[-1])["report"]
    write_json(cell.folder / BENCH, {"plan": bench.model_dump(), "report": report})


def benched(cell: Cell, bench: BenchConfig | None) -> BenchReport | None:
    """The speeds of a cell, measured as ``bench`` says, or anyhow."""
    found = _read(cell.folder / BENCH)
    if found is None or (bench is not None and found["plan"] != bench.model_dump()):
        return None
    return BenchReport.model_validate(found["report"])


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` where there is none, or not a whole one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
