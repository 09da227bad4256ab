"""``qtool sweep``: runs every cell of a sweep in a process of its own, and writes one table of the results.

    OUT/<cell>.yaml      recipe of the cell; `qtool <command> OUT/<cell>.yaml` runs it by hand
    OUT/<cell>.log       standard error of the cell's process
    OUT/<cell>/          checkpoint and report of the cell, and bench.json if speed was measured
    OUT/<cell>.partial/  state of an interrupted cell, from which it continues
    OUT/sweep.json, OUT/sweep.md

The table is rewritten whenever a cell ends.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoints.output_folder import check_folder
from qtool.config.sections import ModelConfig
from qtool.config.sweep import BenchConfig
from qtool.models.folders import resolve
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.targets import select_targets
from qtool.pipelines.checks import check_early
from qtool.pipelines.lock import lock_of
from qtool.reports import comparison
from qtool.reports.compared_paths import compare
from qtool.sweeps import launchers, table
from qtool.sweeps.cell import (
    QTOOL,
    Cell,
    begun_by_another,
    benched,
    drop_weights,
    keep_bench,
    result,
    todo,
    write_recipe,
)
from qtool.sweeps.grid import Sweep, fault_lines
from qtool.sweeps.launchers import Command, Ended
from qtool.sweeps.results import groups
from qtool.sweeps.table import SweepReport
from qtool.system import progress, writing
from qtool.system.errors import InputError, listing
from qtool.system.locks import hold
from qtool.system.paths import path_text

WAITING = "not started yet"
BUSY = ".busy"  # lock file of a sweep's folder; it stays there, and marks the folder as that of a sweep


@dataclass
class SweepOutcome:
    """The report of a sweep, and the names of the cells that ran, were cached or failed in this call."""

    path: Path
    report: SweepReport
    ran: list[str]
    cached: list[str]
    failed: list[str]
    seconds: float


@without_progress_bars()
def sweep(sweep: Sweep, *, fresh: bool = False, jobs: int | None = None) -> SweepOutcome:
    """Run the cells that are not done yet, ``jobs`` at once, and write the table; ``fresh`` runs all cells anew.

    Raises:
        InputError: A model, data, a task, a folder or the launcher of any cell cannot be used; nothing was run.
    """
    started = time.perf_counter()
    sweep.config.launcher.check()
    with _alone(sweep.output):
        cells = [Cell(each, sweep.output) for each in sweep.cells]
        threads = _threads(sweep, jobs)
        _prepare(sweep, cells, threads, fresh)
        left = [cell for cell in cells if cell.todo != "nothing"]
        cached = [cell.definition.name for cell in cells if cell.todo == "nothing" and not cell.reason]
        for name in cached:
            progress.say(f"{name}: cached")
        for cell in cells:
            if cell.reason:
                progress.note(f"{cell.definition.name}: not run: {cell.reason}")
        for cell in left:
            write_recipe(cell)
            cell.reason = WAITING
        try:
            _run(sweep, cells, left, jobs, threads)
            if (options := sweep.config.bench_options()) is not None:
                _bench(sweep, cells, options)
        except KeyboardInterrupt:
            progress.say(f"{_summary(sweep, cells).counts()}; run the same command again to continue")
            raise
        report = _write(sweep, cells)
        _compare(sweep, cells)
    failed = [cell.definition.name for cell in cells if cell.failed]
    ran = [cell.definition.name for cell in left]
    return SweepOutcome(sweep.output, report, ran, cached, failed, time.perf_counter() - started)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    ours = (folder / BUSY).exists()
    writing.make_folder(folder, (table.JSON_NAME, table.MARKDOWN_NAME, comparison.HTML_NAME), ours=ours)
    taken = f"another sweep is running in {folder}; wait for it, or choose another --output"
    busy = hold(folder / BUSY, folder, taken)
    try:
        yield
    finally:
        busy.release()


def _threads(sweep: Sweep, jobs: int | None) -> int | None:
    """Return the threads for each of several concurrent processes; ``None``: the default of a process."""
    if sweep.config.launcher.name != "local" or (jobs or 1) == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs or 1))


# before anything runs


def _prepare(sweep: Sweep, cells: Sequence[Cell], threads: int | None, fresh: bool) -> None:
    """Find the remaining work of each cell, and refuse cells that cannot run.

    Raises:
        InputError: The faults of all cells.
    """
    wrong: dict[str, list[str]] = {}
    folders: dict[str, Path | None] = {}
    hashes: dict[Path, dict[str, str]] = {}
    for cell in cells:
        path = cell.definition.recipe.model.path
        try:
            if path not in folders:
                folders[path] = _at_hand(path, sweep.config.missing_models == "skip")
            folder = folders[path]
            if folder is None:
                cell.reason = f"{path} is not on this machine"
                continue
            lock = lock_of(cell.definition.recipe, folder, hashes.get(folder))
            hashes[folder] = lock.model_files
            launchers.settle(cell.log)
            cell.todo = "run" if fresh else todo(cell, lock, sweep.config.bench_options())
            if cell.todo != "nothing":
                check_folder(cell.folder, overwrite=True, source=folder)
            if cell.todo == "run":
                own = lock if threads is None else lock.model_copy(update={"threads": threads})
                cell.starts_over = fresh or begun_by_another(cell, own, sweep.config.launcher.name)
        except InputError as error:
            wrong.setdefault(str(error), []).append(cell.definition.name)
    runs = {cell.definition.name for cell in cells if cell.todo == "run"}
    for cell in cells:
        if cell.definition.start in runs and not cell.reason:  # what it starts from is made again
            cell.todo, cell.starts_over = "run", True
    _check([cell for cell in cells if cell.todo != "nothing"], wrong)
    if wrong:
        raise InputError(listing(f"{sweep.name} cannot be run:", fault_lines(wrong, len(cells))))


def _at_hand(path: str, skip: bool) -> Path | None:
    if not skip:
        return resolve(path)
    try:
        return resolve(path, fetch=False)
    except InputError:
        return None


def _check(cells: Sequence[Cell], wrong: dict[str, list[str]]) -> None:
    """Add to ``wrong`` the faults that a run would find before its first block; equal checks are made once."""
    asked: dict[str, str] = {}
    models: dict[str, LoadedModel] = {}
    for cell in cells:
        made = cell.definition.recipe
        if cell.definition.start is not None:  # its folder is made by this sweep
            made = made.model_copy(update={"method": made.method.model_copy(update={"init_from": None})})
        key = json.dumps([made.model.path, *(part.model_dump_json() for part in (made.quant, made.data))])
        key += made.method.name + (made.eval.model_dump_json() if made.eval else "")
        if key not in asked:
            asked[key] = ""
            try:
                check_early(made)
                if made.model.path not in models:
                    models[made.model.path] = load_model(ModelConfig(path=made.model.path, device="cpu"))
                select_targets(models[made.model.path], made.quant)
            except InputError as error:
                asked[key] = str(error)
        if asked[key]:
            wrong.setdefault(asked[key], []).append(cell.definition.name)


# running


def _run(sweep: Sweep, cells: Sequence[Cell], left: Sequence[Cell], jobs: int | None, threads: int | None) -> None:
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}

    def note(cell: Cell, ended: Ended) -> None:
        cell.failed, cell.reason = bool(ended.error), ended.error
        if cell.failed:
            progress.note(f"{cell.definition.name}: failed: {ended.error}; see {cell.log}")
        else:
            progress.say(f"{cell.definition.name}: done")
        if not sweep.config.bench:
            _drop(sweep, cell)
        _write(sweep, cells)

    _write(sweep, cells)
    first = [cell for cell in left if cell.definition.start is None]
    for some in (first, [cell for cell in left if cell not in first]):  # these start from what the others made
        commands = [Command(cell.command(), cell.log, environment) for cell in some]
        _launch(sweep, some, commands, jobs, f"running cells, logs in {sweep.output}/*.log", note)
    for cell in cells:
        if not sweep.config.bench and cell not in left:
            _drop(sweep, cell)


def _bench(sweep: Sweep, cells: Sequence[Cell], options: BenchConfig) -> None:
    """Measure the speed of the cells that are done, one after another, so that none slows down another."""
    left = [cell for cell in cells if not cell.reason and benched(cell, options) is None]
    arguments = [text for key, value in options for text in (f"--{key.replace('_', '-')}", str(value))]
    commands = [
        Command(
            [
                *QTOOL,
                "bench",
                path_text(cell.folder),
                *arguments,
                "--device",
                cell.definition.recipe.model.device,
                "--json",
            ],
            cell.log.with_suffix(".bench.log"),
            {},
        )
        for cell in left
    ]

    def note(cell: Cell, ended: Ended) -> None:
        if ended.error:
            cell.failed, cell.reason = True, f"bench: {ended.error}"
            progress.note(f"{cell.definition.name}: failed: {cell.reason}")
        else:
            keep_bench(cell, options, ended.output)

    _launch(sweep, left, commands, 1, "measuring speed", note)
    for cell in cells:
        _drop(sweep, cell)


def _launch(
    sweep: Sweep,
    cells: Sequence[Cell],
    commands: Sequence[Command],
    jobs: int | None,
    title: str,
    note: Callable[[Cell, Ended], None],
) -> None:
    """Run a command for each of ``cells``, and call ``note`` with the end of each."""
    if not commands:
        return
    with (
        progress.counted(title, len(commands)) as reach,
        closing(launchers.launch(sweep.config.launcher, commands, jobs, sweep.output / "submitit")) as ends,
    ):
        for count, (index, ended) in enumerate(ends, 1):
            note(cells[index], ended)
            reach(count)


def _drop(sweep: Sweep, cell: Cell) -> None:
    """Delete the weights of a cell that is done, if the sweep keeps only reports."""
    if sweep.config.keep == "reports" and not cell.reason:
        drop_weights(cell)


# results


def _write(sweep: Sweep, cells: Sequence[Cell]) -> SweepReport:
    """Write the table with the results so far."""
    report = _summary(sweep, cells)
    report.write(sweep.output)
    return report


def _compare(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Write the page that compares the cells that are done."""
    done = [cell.folder for cell in cells if not cell.reason]
    if done:
        writing.write_text(sweep.output / comparison.HTML_NAME, compare(done).html(sweep.output))


def _summary(sweep: Sweep, cells: Sequence[Cell]) -> SweepReport:
    rows = tuple(result(cell) for cell in cells)
    over = sweep.config.over
    return SweepReport(
        name=sweep.name, title=sweep.title, over=over, cells=rows, groups=groups(rows, over) if over else ()
    )
