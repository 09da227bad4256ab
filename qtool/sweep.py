"""``qtool sweep``: every cell of a sweep, each in a process of its own, and one table of what they came to.

    OUT/<cell>.yaml      the cell's recipe; `qtool <command> OUT/<cell>.yaml` runs it by hand
    OUT/<cell>.log       what its process said
    OUT/<cell>/          its checkpoint and report, and bench.json where speed was measured
    OUT/<cell>.partial/  what an interrupted cell goes on from
    OUT/sweep.json, OUT/sweep.md

A cell is done, and not run again, when its folder was made from the same lock (``run.lock_of``: recipe, model files,
versions) and its report is of the same evaluation. The processor and the number of threads are not compared, so that
cells of several machines can stand in one table, which then says so. Where only the evaluation is missing or another,
nothing is quantized again. A report is of the evaluation in ``OUT/<cell>.yaml``: it is removed before that changes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
import yaml
from filelock import FileLock, Timeout

from qtool import launch, progress, recipe
from qtool.checkpoint import MANIFEST, check_folder, write_json
from qtool.config import ModelConfig
from qtool.errors import InputError
from qtool.folders import resolve
from qtool.grid import BenchConfig, Plan, Planned, fault_lines
from qtool.launch import Command, Ended
from qtool.models import load_model
from qtool.report import JSON_NAME as REPORT
from qtool.report import Report, compare
from qtool.run import check_early, lock_of
from qtool.speed import BenchReport
from qtool.state import differences
from qtool.summary import CellResult, SweepReport, groups

BENCH = "bench.json"
MACHINE = ("processor", "threads", "processes")  # of a lock: where it ran
WAITING = "its turn has not come yet"
QTOOL = [sys.executable, "-m", "qtool"]


@dataclass
class Outcome:
    """What a sweep made, and what became of its cells in this call."""

    path: Path
    report: SweepReport
    ran: list[str]
    cached: list[str]
    failed: list[str]
    seconds: float

    exports = ()


@dataclass
class _Cell:
    """A cell under way: what is left of it, and why it failed or is not run."""

    plan: Planned
    out: Path
    todo: Literal["run", "evaluate", "nothing"] = "nothing"
    starts_over: bool = False
    failed: bool = False
    reason: str = ""

    @property
    def folder(self) -> Path:
        return self.out / self.plan.name

    @property
    def file(self) -> Path:
        return self.out / f"{self.plan.name}.yaml"

    @property
    def log(self) -> Path:
        return self.out / f"{self.plan.name}.log"

    def command(self) -> list[str]:
        """What does the rest of it."""
        if self.todo == "evaluate":
            return [*QTOOL, "eval", str(self.file), "--output", str(self.folder), "--json"]
        options = [*(["--overwrite"] if self.folder.exists() else []), *(["--fresh"] if self.starts_over else [])]
        return [*QTOOL, self.plan.command, str(self.file), "--json", *options]


def sweep(plan: Plan, *, fresh: bool = False, jobs: int | None = None) -> Outcome:
    """Run the cells that are not done yet, ``jobs`` at once, and write the table; ``fresh`` runs all of them anew.

    Raises:
        InputError: a model, data, a task, a folder or the launcher that cannot be used, by any of the cells; nothing
            was run.
    """
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    plan.config.launcher.check()
    with _alone(plan.output):
        cells = [_Cell(each, plan.output) for each in plan.cells]
        threads = _threads(plan, jobs)
        _prepare(plan, cells, threads, fresh)
        left = [cell for cell in cells if cell.todo != "nothing"]
        cached = [cell.plan.name for cell in cells if cell.todo == "nothing" and not cell.reason]
        for name in cached:
            progress.note(f"{name}: cached")
        for cell in cells:
            if cell.reason:
                progress.note(f"{cell.plan.name}: not run: {cell.reason}")
        for cell in left:
            _write_recipe(cell)
            cell.reason = WAITING
        try:
            _run(plan, cells, left, jobs, threads)
            if plan.config.bench:
                _bench(plan, cells)
        except KeyboardInterrupt:
            progress.note(f"{_summary(plan, cells).counts()}; the same command goes on with the others")
            raise
        report = _summary(plan, cells)
        report.write(plan.output)
    failed = [cell.plan.name for cell in cells if cell.failed]
    ran = [cell.plan.name for cell in left]
    return Outcome(plan.output, report, ran, cached, failed, time.perf_counter() - started)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        busy = FileLock(folder / ".busy", mode=0o666)
        busy.acquire(blocking=False)
    except Timeout:
        raise InputError(f"another sweep is at work in {folder}; wait for it, or choose another --output") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        yield
    finally:
        busy.release()


def _threads(plan: Plan, jobs: int | None) -> int | None:
    """Threads of each of several processes side by side; ``None``: as many as a process takes by itself."""
    if plan.config.launcher.name != "local" or (jobs or 1) == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs or 1))


# before anything runs


def _prepare(plan: Plan, cells: Sequence[_Cell], threads: int | None, fresh: bool) -> None:
    """Find out what is left of each cell, and refuse what cannot be run.

    Raises:
        InputError: with the faults of all cells.
    """
    wrong: dict[str, list[str]] = {}
    folders: dict[str, Path | None] = {}
    hashes: dict[Path, dict[str, str]] = {}
    for cell in cells:
        path = cell.plan.recipe.model.path
        try:
            if path not in folders:
                folders[path] = _at_hand(path, plan.config.missing_models == "skip")
            folder = folders[path]
            if folder is None:
                cell.reason = f"{path} is not at hand"
                continue
            lock = lock_of(cell.plan.recipe, folder, hashes.get(folder))
            hashes[folder] = lock["model_files"]
            launch.settle(cell.log)
            cell.todo = "run" if fresh else _todo(cell, lock, plan.config.bench)
            if cell.todo != "nothing":
                check_folder(cell.folder, overwrite=True, source=folder)
            if cell.todo == "run":
                own = lock if threads is None else lock | {"threads": threads}
                cell.starts_over = fresh or _begun_by_another(cell, own, plan.config.launcher.name)
        except InputError as error:
            wrong.setdefault(str(error), []).append(cell.plan.name)
    _check([cell for cell in cells if cell.todo != "nothing"], wrong)
    if wrong:
        raise InputError("\n  ".join([f"{plan.name} cannot be run:", *fault_lines(wrong, len(cells))]))


def _at_hand(path: str, skip: bool) -> Path | None:
    if not skip:
        return resolve(path)
    try:
        return resolve(path, fetch=False)
    except InputError:
        return None


def _check(cells: Sequence[_Cell], wrong: dict[str, list[str]]) -> None:
    """Note in ``wrong`` what a run would refuse before its first block, each kind of question asked once."""
    asked: dict[str, str] = {}
    models: dict[str, Any] = {}
    for cell in cells:
        made = cell.plan.recipe
        key = json.dumps([made.model.path, *(part.model_dump_json() for part in (made.quant, made.data))])
        key += made.method.name + (made.eval.model_dump_json() if made.eval else "")
        if key not in asked:
            asked[key] = ""
            try:
                check_early(made)
                if made.model.path not in models:
                    models[made.model.path] = load_model(ModelConfig(path=made.model.path, device="cpu"))
                models[made.model.path].targets(made.quant)
            except InputError as error:
                asked[key] = str(error)
        if asked[key]:
            wrong.setdefault(asked[key], []).append(cell.plan.name)


def _todo(cell: _Cell, lock: dict[str, Any], bench: bool | BenchConfig) -> Literal["run", "evaluate", "nothing"]:
    manifest = _read(cell.folder / MANIFEST)
    if manifest is None or list(differences(_anywhere(manifest.get("lock") or {}), _anywhere(lock))):
        return "run"
    has_weights = any(cell.folder.glob("*.safetensors"))
    if bench and not has_weights and _benched(cell, bench) is None:
        return "run"
    if _report(cell) is not None and _evaluation(cell) == cell.plan.recipe.eval:
        return "nothing"
    return "evaluate" if has_weights and cell.plan.recipe.eval is not None else "run"


def _anywhere(lock: dict[str, Any]) -> dict[str, Any]:
    """A lock without the machine, as it is after it was written and read."""
    kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in lock.items() if key not in MACHINE}))
    return kept


def _begun_by_another(cell: _Cell, lock: dict[str, Any], launcher: str) -> bool:
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


def _write_recipe(cell: _Cell) -> None:
    if _evaluation(cell) != cell.plan.recipe.eval:
        (cell.folder / REPORT).unlink(missing_ok=True)
    head = f"# Cell {cell.plan.name} of a sweep.\n#   qtool {cell.plan.command} {cell.file}\n\n"
    cell.file.write_text(head + yaml.safe_dump(cell.plan.raw, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _evaluation(cell: _Cell) -> Any:
    """The evaluation that a cell's file asks for; ``False`` where there is no such file."""
    try:
        return recipe.load(cell.file).eval
    except InputError:
        return False


# running


def _run(plan: Plan, cells: Sequence[_Cell], left: Sequence[_Cell], jobs: int | None, threads: int | None) -> None:
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    commands = [Command(cell.command(), cell.log, environment) for cell in left]
    _summary(plan, cells).write(plan.output)
    for cell, ended in _launched(plan, left, commands, jobs, "running cells"):
        cell.failed, cell.reason = bool(ended.error), ended.error
        if cell.failed:
            progress.note(f"{cell.plan.name}: failed: {ended.error}; see {cell.log}")
        else:
            progress.note(f"{cell.plan.name}: done")
        if not plan.config.bench:
            _drop(plan, cell)
        _summary(plan, cells).write(plan.output)
    for cell in cells:
        if not plan.config.bench and cell not in left:
            _drop(plan, cell)


def _bench(plan: Plan, cells: Sequence[_Cell]) -> None:
    """Measure the speed of the cells that are done, one after another, so that none disturbs another."""
    config = _how(plan.config.bench)
    left = [cell for cell in cells if not cell.failed and not cell.reason and _benched(cell, config) is None]
    options = [text for key, value in config for text in (f"--{key.replace('_', '-')}", str(value))]
    commands = [
        Command(
            [*QTOOL, "bench", str(cell.folder), *options, "--device", cell.plan.recipe.model.device, "--json"],
            cell.log.with_suffix(".bench.log"),
            {},
        )
        for cell in left
    ]
    for cell, ended in _launched(plan, left, commands, 1, "measuring speed"):
        if ended.error:
            cell.failed, cell.reason = True, f"bench: {ended.error}"
            progress.note(f"{cell.plan.name}: failed: {cell.reason}")
        else:
            report = json.loads(ended.output.strip().splitlines()[-1])["report"]
            write_json(cell.folder / BENCH, {"plan": config.model_dump(), "report": report})
    for cell in cells:
        _drop(plan, cell)


def _launched(
    plan: Plan, cells: Sequence[_Cell], commands: Sequence[Command], jobs: int | None, title: str
) -> Iterator[tuple[_Cell, Ended]]:
    if not commands:
        return
    with progress.counted(title, len(commands)) as reach:
        ends = launch.launch(plan.config.launcher, commands, jobs, plan.output / "submitit")
        with closing(ends):  # type: ignore[type-var] # a generator has close
            for count, (index, ended) in enumerate(ends, 1):
                yield cells[index], ended
                reach(count)


def _drop(plan: Plan, cell: _Cell) -> None:
    """Remove the weights of a cell that is done, where only reports are kept."""
    if plan.config.keep == "reports" and not cell.failed and not cell.reason:
        for file in cell.folder.glob("*.safetensors*"):
            file.unlink()


# results


def _summary(plan: Plan, cells: Sequence[_Cell]) -> SweepReport:
    """The table as it stands. (``compare.html`` of the reports is to be written here too, beside ``sweep.md``.)"""
    rows = tuple(_result(cell) for cell in cells)
    over = plan.config.over
    return SweepReport(
        name=plan.name, title=plan.title, over=over, cells=rows, groups=groups(rows, over) if over else ()
    )


def _result(cell: _Cell) -> CellResult:
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
        bench=_benched(cell, None),
        dtype=report.dtype,
        device=report.device,
        machine=f"{lock['processor']}, {lock['threads']} threads",
    )


def _report(cell: _Cell) -> Report | None:
    """The report of a cell; ``None`` where there is none, or not a whole one."""
    found = _read(cell.folder / REPORT)
    return None if found is None else Report.model_validate(found)


def _how(bench: bool | BenchConfig) -> BenchConfig:
    return bench if isinstance(bench, BenchConfig) else BenchConfig()


def _benched(cell: _Cell, bench: bool | BenchConfig | None) -> BenchReport | None:
    """The speeds of a cell, measured as ``bench`` says, or anyhow."""
    found = _read(cell.folder / BENCH)
    if found is None or (bench is not None and found["plan"] != _how(bench).model_dump()):
        return None
    return BenchReport.model_validate(found["report"])


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` where there is none, or not a whole one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
