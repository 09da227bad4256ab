"""``qtool ptq|qat|efficientqat|lrqat``: recipe -> model -> text -> method -> checkpoint -> evaluation -> exports.

``quantize`` is the table of contents; the functions after it are its steps, in order. Faults of the recipe are reported
before the model is quantized, where that is possible. The checkpoint gets its name when it is complete; evaluation and
exports come after that, so a failure there does not lose it, and the same command goes on with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qtool.allocation import k_mixture
from qtool.allocation.plan import BitPlan, mixed, narrowest, units_of
from qtool.blocks.job import Job, Method, Result, load_method
from qtool.blocks.tables import pack_embeddings
from qtool.checkpoints import files, native, output_folder, side_files, sizes
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint, PlannedCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.quant import QuantSpec
from qtool.config.recipe import Recipe, as_yaml, resolved
from qtool.config.sections import MethodConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.evaluation import tasks, weights
from qtool.evaluation.contamination import CalibrationSeen
from qtool.evaluation.continuations import continuations
from qtool.models import quantized_sources
from qtool.models.auto_class import is_multimodal
from qtool.models.described import keep_first
from qtool.models.folders import resolve
from qtool.models.gguf_view import source_of
from qtool.models.linears import Target, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import choose_device, load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.shared import share_equal
from qtool.models.tables import select_tables
from qtool.models.targets import select_targets
from qtool.pipelines import expected, model_free, scale_dtype, target, tracking, trial
from qtool.pipelines.checks import check_early, check_exports, check_output, check_text, needs_text
from qtool.pipelines.clock import PhaseTimer
from qtool.pipelines.complete import complete_already
from qtool.pipelines.export import write_export
from qtool.pipelines.kept_forecast import kept
from qtool.pipelines.lock import lock_of
from qtool.pipelines.manifest import CalibrationTokens, Manifest
from qtool.pipelines.outcome import Outcome, described_text, publish
from qtool.pipelines.plan import kept_plan
from qtool.pipelines.run_state import RunState, run_state
from qtool.pipelines.workspace import RunWorkspace
from qtool.quant.packed_weight import FORMAT_VERSION
from qtool.reports import model_card
from qtool.reports.base_card import base_card
from qtool.reports.gate import verdict
from qtool.reports.records import CalibrationText, Exported, Lock, beside_published
from qtool.reports.report import Report
from qtool.system import distributed, progress
from qtool.system.environment import environment
from qtool.system.errors import InputError
from qtool.system.paths import path_text
from qtool.system.tensors import dtype_name


@dataclass(frozen=True)
class Run:
    """The recipe of a run, its method, its folder, and its timer."""

    recipe: Recipe
    method: Method[MethodConfig]
    state: RunState
    timer: PhaseTimer
    first_blocks: int | None = None  # a probe quantizes the first blocks only (probe.py)
    tracker: tracking.Tracker = tracking.NO_TRACKER


@dataclass(frozen=True)
class Prepared:
    """The job of a run, and the other facts that are known before the first block is quantized."""

    job: Job
    text: Calibration | None
    described: CalibrationText | None  # the text, for reports
    plan: BitPlan | None  # bit widths chosen for a budget, if there is one
    specs: dict[str, QuantSpec]
    shapes: dict[str, tuple[int, int]]  # (out, in) of each target
    linears: dict[str, tuple[int, int]]  # (out, in) of each linear of the blocks
    float_bytes: int

    @property
    def label(self) -> str:
        """The grids in short."""
        return grids_label(self.specs, native.as_listed(self.job.tables))


@without_progress_bars()
def quantize(recipe: Recipe, fresh: bool = False) -> Outcome | None:
    """Run a recipe, or continue an earlier start of it that was stopped.

    ``fresh`` removes an unfinished run first. Of several processes, the first writes and evaluates; the others return
    ``None``.

    Raises:
        InputError: the recipe, the model or the data cannot be used; nothing was written.
        RunError: the run could not be finished.
    """
    timer = PhaseTimer()
    if recipe.model.free:
        model_free.check(recipe)
    faults: list[str] = []
    try:
        recipe = target.applied(scale_dtype.chosen(recipe))
    except InputError as error:
        faults.append(str(error))
    check_early(recipe, faults, output=True)
    folder = resolve(recipe.model.path)
    lock = lock_of(recipe, folder)
    if not fresh and (report := complete_already(recipe, lock)) is not None:
        progress.say(f"{recipe.output.path} is complete already, made by this recipe; --overwrite makes it again")
        return _outcome(recipe, _judged_again(recipe, report), timer) if distributed.is_first() else None
    check_output(recipe, fresh=fresh)
    with open_run(recipe, folder, lock, fresh, timer) as run:
        if run.state.written is None and recipe.model.free:
            _keep(run, *model_free.run(recipe, run.method, run.state, timer))
        elif run.state.written is None:
            prepared = prepare(run)
            result = run_method(run, prepared)
            if not distributed.is_first():
                return None
            save(run, prepared, result)
            del prepared, result  # frees the model
        if not distributed.is_first():
            return None
        run.state.publish()
        evaluate(run)
        report = export_all(run)
        run.tracker.result(tracking.result_figures(report))
    return _outcome(recipe, report, timer)


def _outcome(recipe: Recipe, report: Report, timer: PhaseTimer) -> Outcome:
    return Outcome(recipe.output.path, report, [Path(each.path) for each in report.exports], timer.total)


@contextmanager
def open_run(recipe: Recipe, folder: Path, lock: Lock, fresh: bool, timer: PhaseTimer) -> Iterator[Run]:
    """Open the folder of a new or an unfinished run; it is removed after the ``with`` block."""
    method: Method[MethodConfig] = load_method(recipe.method.name)
    distributed.start(choose_device(recipe.model.device))
    output = recipe.output
    with (
        run_state(
            output.path,
            lock,
            overwrite=output.overwrite,
            fresh=fresh,
            source=source_of(folder),
            end_to_end=method.end_to_end(recipe.method),
        ) as state,
        quantized_sources.expanded_in(state.folder / "expanded"),
        tracking.opened(recipe, state) as tracker,
    ):
        yield Run(recipe, method, state, timer, tracker=tracker)


def prepare(run: Run) -> Prepared:
    """Load the model, select its targets, check disk and exports, read calibration text and choose bit widths."""
    recipe, timer = run.recipe, run.timer
    with timer.phase("load", f"loading {recipe.model.path}"):
        loaded = load_model(recipe.model, streamed=True)
        if run.first_blocks is not None:
            keep_first(loaded, run.first_blocks)
        if recipe.eval is not None:
            tasks.check_model(recipe.eval, loaded)
        quant = k_mixture.quant_of(recipe, loaded)
        units = None if quant.budget is None else units_of(loaded, quant)
        start = quant if units is None else narrowest(quant)
        targets, tables = select_targets(loaded, start), select_tables(loaded, start)
    num_parts = len(loaded.blocks()) + len(tables.of_method)
    workspace = RunWorkspace(run.state, loaded, recipe.data.memory_budget, num_parts, run.tracker)
    shapes = {target.name: target.weight_shape for target in targets} | tables.shapes
    specs = _specs(targets) | tables.specs | ({} if units is None else mixed(units))
    planned = PlannedCheckpoint(loaded, specs, shapes, tables)
    float_bytes = _check_space_and_exports(recipe, loaded, planned)
    progress.say(expected.in_words(recipe, loaded, planned, float_bytes))
    if distributed.is_first():
        trial.try_out(run.state.folder / "trial", recipe, loaded, specs, shapes, tables)
    text = read = plan = None
    if needs_text(recipe):
        with timer.phase("data", f"reading calibration text: {recipe.data.source}"):
            text = calibration_text(recipe, loaded, run.state)
            check_text(recipe, text, shapes)
            read = described_text(recipe.data, loaded, text)
    tokens, labels, pictures = text or (None, None, ())
    job = Job(loaded, targets + tables.of_method, tokens, labels, recipe.seed, workspace, pictures, tables)
    if units is not None:
        with timer.phase("allocate", "choosing bit widths"):
            plan = kept_plan(recipe, run.state, job, units)
        chosen = plan.applied(quant)
        tables = select_tables(loaded, chosen)
        job = replace(job, targets=select_targets(loaded, chosen) + tables.of_method, tables=tables)
        specs = _specs(job.targets) | tables.specs
        check_exports(recipe, PlannedCheckpoint(loaded, specs, shapes, tables))  # they may refuse a width
    if not run.method.needs_data(recipe.method):
        job = replace(job, tokens=None, labels=None, pictures=())
    return Prepared(job, text, read, plan, specs, shapes, weights.block_linears(loaded), float_bytes)


def _specs(targets: tuple[Target, ...]) -> dict[str, QuantSpec]:
    """Return the grid of each target by name."""
    return {target.name: target.spec for target in targets}


def _check_space_and_exports(recipe: Recipe, loaded: LoadedModel, planned: PlannedCheckpoint) -> int:
    """Check the space on disk and the exports; return the bytes of the float weights."""
    output_folder.check_space(recipe.output.path, loaded.num_bytes)  # an upper bound of the checkpoint
    check_exports(recipe, planned)
    return loaded.num_bytes


def calibration_text(recipe: Recipe, loaded: LoadedModel, state: RunState) -> Calibration:
    """Return the calibration windows; the first process makes and keeps them, and all read them."""
    if distributed.is_first():
        if recipe.data.source != "generated":
            state.keep_tokens(*windows.calibration(recipe.data, loaded, recipe.seed))
        elif state.calibration() is None:
            # a streamed model cannot generate text
            state.keep_tokens(*windows.calibration(recipe.data, load_model(recipe.model, checked=loaded), recipe.seed))
    distributed.barrier()
    text = state.calibration()
    assert text is not None
    return text


def run_method(run: Run, prepared: Prepared) -> Result:
    """Let the method quantize the model of the job in place."""
    recipe, job = run.recipe, prepared.job
    with run.timer.phase("quantize", f"quantizing with {recipe.method.name}, {prepared.label}"):
        job = pack_embeddings(job)
        result = run.method.run(job, recipe.method)
        result = result._replace(weight_errors={**job.tables.errors, **result.weight_errors})
    distributed.finish()
    if distributed.is_first():
        assert set(packed_linears(job.loaded.model)) <= set(prepared.specs), (
            "the method quantized more than its targets"
        )
    return result


def save(run: Run, prepared: Prepared, result: Result) -> None:
    """Write the checkpoint, its manifest and its model card; keep the report, without an evaluation."""
    recipe, state, loaded = run.recipe, run.state, prepared.job.loaded
    with run.timer.phase("save", f"writing {recipe.output.path}"):
        errors = result.weight_errors
        if state.end_to_end:
            errors = weights.weight_errors(loaded, recipe.model)
            output_folder.clear(state.model)  # files of an earlier start, which was killed while it wrote them
        native.save(state.model, loaded, prepared.specs, prepared.job.tables)
        report = _report(run, prepared, result, errors)
        _keep(run, report, errors, prepared.text, prepared.plan)


def _keep(
    run: Run,
    report: Report,
    weight_errors: dict[str, float],
    text: Calibration | None = None,
    plan: BitPlan | None = None,
) -> None:
    """Write manifest and model card of the checkpoint whose other files are written; keep its report."""
    path = run.recipe.model.path
    made = {"base_card": base_card(resolve(path), path), "command": run.method.command, "recipe": as_yaml(run.recipe)}
    report = report.model_copy(update=made)
    _manifest(run, report, weight_errors, text, plan).write(run.state.model)
    model_card.write(run.state.model, report, MANIFEST, run.recipe.output.path.name)
    run.state.keep_written(report)


def _report(run: Run, prepared: Prepared, result: Result, weight_errors: dict[str, float]) -> Report:
    """Return the report before anything is evaluated."""
    recipe, loaded, source = run.recipe, prepared.job.loaded, NativeCheckpoint(run.state.model)
    return Report(
        model=recipe.model.path,
        quantized=str(recipe.output.path),
        label=prepared.label,
        method=recipe.method.name,
        bits_per_weight=sizes.linear_bits(source),
        file_bits_per_weight=sizes.file_bits(source),
        float_bytes=prepared.float_bytes,
        quantized_bytes=source.num_bytes(),
        dtype=dtype_name(loaded.dtype),
        device=str(loaded.device),
        multimodal=is_multimodal(loaded.model.config),
        seed=recipe.seed,
        calibration=prepared.described,
        expected=beside_published(recipe.expected, ()),
        linears=weights.linear_records(prepared.linears, source, weight_errors),
        tables=weights.table_records(loaded, source, weight_errors),
        series=result.series,
        planned=kept(recipe),
        lock=run.state.lock,
        **run.timer.measured(),
    )


def _manifest(
    run: Run, report: Report, weight_errors: dict[str, float], text: Calibration | None, plan: BitPlan | None
) -> Manifest:
    """Return the manifest of the checkpoint, whose files have been written."""
    tokens = None
    if text is not None:
        assert report.calibration is not None
        tokens = CalibrationTokens(
            tokens=text.tokens.shape,
            sha256=windows.token_hash(*text),
            rendering=report.calibration.rendering,
            num_learned=report.calibration.num_learned,
        )
    assert report.label is not None
    assert report.bits_per_weight is not None
    assert report.float_bytes is not None
    return Manifest(
        format_version=FORMAT_VERSION,
        recipe=resolved(run.recipe),
        seed=run.recipe.seed,
        data=tokens,
        label=report.label,
        bits_per_weight=report.bits_per_weight,
        float_bytes=report.float_bytes,
        quantized_bytes=files.folder_bytes(run.state.model),
        series=report.series,
        weight_errors=weight_errors,
        seconds=report.seconds,
        versions=environment(),
        date=report.date,
        plan=plan,
        command=run.method.command,
        lock=run.state.lock,
        files=files.file_hashes(run.state.model, *side_files.HASHED),
    )


def evaluate(run: Run) -> None:
    """Measure the checkpoint with the tasks that no earlier start measured, and write the report."""
    recipe, state = run.recipe, run.state
    assert state.written is not None
    report = state.written.report
    asked = None if recipe.eval is None else recipe.eval.model_dump(mode="json")
    if recipe.eval is not None and not (state.written.evaluated and state.written.evaluation == asked):
        progress.say(f"{recipe.output.path} is complete; it is evaluated next")
        with run.timer.phase("eval", "evaluating"):
            ours = recipe.model.model_copy(update={"path": path_text(recipe.output.path)})
            written = load_model(ours, quantized=True)
            reference = share_equal(written, load_model(recipe.model))
            text = state.calibration()
            seen = None if text is None else CalibrationSeen(recipe.data.source, text.tokens)
            done, keep = state.measured(asked), partial(state.keep_task, asked)
            results = tasks.evaluate(written, recipe.eval, reference, recipe.seed, seen, done, keep)
            texts = continuations(written, recipe.eval, reference)
        found = {"results": tuple(results), "continuations": texts, "backend": recipe.eval.backend}
        report = report.model_copy(update=found | {"expected": beside_published(recipe.expected, results)})
    report = run.timer.added_to(report).model_copy(update={"gate": verdict(recipe.gate, report.shown())})
    state.keep_evaluated(asked, report)
    publish(recipe.output.path, report, recipe.output.plots)


def export_all(run: Run) -> Report:
    """Write the exports of the recipe that earlier starts did not; return the report with them, and write it again."""
    recipe, state = run.recipe, run.state
    assert state.written is not None
    exports: list[Exported] = []
    for entry in recipe.export:
        with run.timer.phase(f"export {entry.format}", f"exporting {entry.format}"):
            exports.append(write_export(recipe.output.path, entry, recipe.output.overwrite))
    if not exports:
        return state.written.report
    report = run.timer.added_to(state.written.report.model_copy(update={"exports": tuple(exports)}))
    publish(recipe.output.path, report, recipe.output.plots)
    return report


def _judged_again(recipe: Recipe, report: Report) -> Report:
    """Return the report of a complete run with the verdict of the recipe's gate; if it is another one, write it."""
    now = report.model_copy(update={"gate": verdict(recipe.gate, report.shown())})
    if now.gate != report.gate:
        publish(recipe.output.path, now, recipe.output.plots)
    return now
