"""``qtool ptq|qat|efficientqat|lrqat``: recipe -> model -> text -> method -> checkpoint -> evaluation -> exports.

Everything that can be refused is refused before the model is quantized. The checkpoint gets its name when it is whole;
evaluation and exports come after, and a failure there loses nothing of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.allocation.plan import BitPlan, mixed, units_of
from qtool.blocks.job import Job, Method, Result, load_method
from qtool.checkpoints import files, native, output_folder, sizes
from qtool.checkpoints.native import MANIFEST, PlannedCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import MethodConfig, OutputConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.evaluation import tasks, weights
from qtool.evaluation.contamination import CalibrationSeen
from qtool.models.folders import resolve
from qtool.models.linears import Target, packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import choose_device, load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.targets import select_targets
from qtool.pipelines.checks import check_early, check_exports, needs_text
from qtool.pipelines.clock import PhaseTimer
from qtool.pipelines.export import write_export
from qtool.pipelines.lock import lock_of
from qtool.pipelines.manifest import CalibrationTokens, Manifest
from qtool.pipelines.outcome import Outcome, described
from qtool.pipelines.plan import kept_plan
from qtool.pipelines.run_state import RunState, run_state
from qtool.pipelines.workspace import RunWorkspace
from qtool.quant.packed_linear import FORMAT_VERSION
from qtool.reports import html, model_card
from qtool.reports.records import Exported, beside_published
from qtool.reports.report import Report
from qtool.system import distributed, progress
from qtool.system.environment import environment
from qtool.system.tensors import dtype_name


@dataclass(frozen=True)
class Run:
    """A run under way: its recipe and method, its folder, and how long it has taken."""

    recipe: Recipe
    method: Method[MethodConfig]
    state: RunState
    clock: PhaseTimer


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first block is quantized."""

    job: Job
    quant: QuantConfig  # with the widths that a budget came to
    text: Calibration | None
    plan: BitPlan | None
    specs: dict[str, QuantSpec]
    shapes: dict[str, tuple[int, int]]  # (out, in) of each target
    linears: dict[str, tuple[int, int]]  # (out, in) of each linear of the blocks
    float_bytes: int


@without_progress_bars()
def quantize(recipe: Recipe, fresh: bool = False) -> Outcome | None:
    """Run a recipe, or go on where an earlier start of it was stopped.

    ``fresh`` forgets an unfinished run. Of several processes the first one writes and evaluates; others get ``None``.

    Raises:
        InputError: anything in the recipe, the model or the data that cannot be used; nothing was written.
        RunError: the run could not be finished.
    """
    clock = PhaseTimer()
    check_early(recipe)
    with open_run(recipe, fresh, clock) as run:
        prepared = prepare(run)
        result = run_method(run, prepared)
        if not distributed.is_first():
            return None
        report = save(run, prepared, result)
        text = prepared.text
        del prepared, result  # the model
    report = evaluate(recipe, report, text, clock)
    _publish(recipe.output, report)
    report = export_all(recipe, report, clock)
    return Outcome(recipe.output.path, report, [Path(each.path) for each in report.exports], clock.total)


@contextmanager
def open_run(recipe: Recipe, fresh: bool, clock: PhaseTimer) -> Iterator[Run]:
    """Take the folder of the run, begun anew or where an earlier start was stopped; its result gets its name last."""
    method: Method[MethodConfig] = load_method(recipe.method.name)
    folder = resolve(recipe.model.path)
    distributed.start(choose_device(recipe.model.device))
    lock = lock_of(recipe, folder)
    output = recipe.output
    with run_state(
        output.path,
        lock,
        overwrite=output.overwrite,
        fresh=fresh,
        source=folder,
        end_to_end=method.end_to_end(recipe.method),
    ) as state:
        yield Run(recipe, method, state, clock)


def prepare(run: Run) -> Prepared:
    """Load the model, select and check its targets, refuse exports, read text and choose widths."""
    recipe, quant, clock = run.recipe, run.recipe.quant, run.clock
    with clock.phase("load", f"loading {recipe.model.path}"):
        loaded = load_model(recipe.model, streamed=True)
        units = None if quant.budget is None else units_of(loaded, quant)
        targets = select_targets(loaded, quant) if units is None else tuple(t for unit in units for t in unit.targets)
    workspace = RunWorkspace(run.state, loaded, recipe.data.memory_budget)
    shapes = {target.name: target.weight_shape for target in targets}
    specs = _specs(targets) if units is None else mixed(units)
    float_bytes = _refuse_late_faults(recipe, loaded, specs, shapes)
    text = plan = None
    if needs_text(recipe):
        with clock.phase("data", f"reading calibration text: {recipe.data.source}"):
            text = calibration_text(recipe, loaded, run.state)
    tokens, labels = text or (None, None)
    job = Job(loaded, targets, tokens, labels, recipe.seed, workspace)
    if units is not None:
        with clock.phase("allocate", "choosing widths"):
            plan = kept_plan(recipe, run.state, job, units)
        quant = plan.applied(quant)
        job = replace(job, targets=select_targets(loaded, quant))
    if not run.method.needs_data(recipe.method):
        job = replace(job, tokens=None, labels=None)
    linears = weights.block_linears(loaded)
    return Prepared(job, quant, text, plan, _specs(job.targets), shapes, linears, float_bytes)


def _specs(targets: tuple[Target, ...]) -> dict[str, QuantSpec]:
    return {target.name: target.spec for target in targets}


def _refuse_late_faults(
    recipe: Recipe, loaded: LoadedModel, specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]
) -> int:
    """Refuse a disk that is too full and exports that cannot be; returns the bytes of the float weights."""
    float_bytes = sum(p.numel() for p in loaded.model.parameters()) * loaded.storage_dtype.itemsize
    output_folder.check_space(recipe.output.path, float_bytes)  # never more than the float model
    check_exports(recipe, PlannedCheckpoint(loaded, specs, shapes))
    return float_bytes


def calibration_text(recipe: Recipe, loaded: LoadedModel, state: RunState) -> Calibration:
    """The calibration windows, made by the first process and read by all."""
    if distributed.is_first():
        if recipe.data.source != "generated":
            state.keep_tokens(*windows.calibration(recipe.data, loaded, recipe.seed))
        elif state.calibration() is None:
            # to write text a model must be whole
            state.keep_tokens(*windows.calibration(recipe.data, load_model(recipe.model), recipe.seed))
    distributed.barrier()
    text = state.calibration()
    assert text is not None
    return text


def run_method(run: Run, prepared: Prepared) -> Result:
    """Quantize the model of the job in place."""
    recipe, job = run.recipe, prepared.job
    with run.clock.phase("quantize", f"{recipe.method.name}, {grids_label(prepared.specs)}"):
        result = run.method.run(job, recipe.method)
    distributed.finish()
    if distributed.is_first():
        assert set(packed_linears(job.loaded.model)) <= set(prepared.specs), (
            "the method quantized more than its targets"
        )
    return result


def save(run: Run, prepared: Prepared, result: Result) -> Report:
    """Write the checkpoint with its manifest and model card."""
    recipe, state, loaded = run.recipe, run.state, prepared.job.loaded
    with run.clock.phase("save", f"writing {recipe.output.path}"):
        errors = result.weight_errors
        if state.end_to_end:
            errors = weights.weight_errors(loaded, recipe.model, prepared.quant)
            output_folder.clear(state.model)  # all is in memory; what is there is of a run that was killed here
        native.save(state.model, loaded, prepared.specs)
        report = _report(run, prepared, result, errors)
        _manifest(run, prepared, report, errors).write(state.model)
        model_card.write(state.model, report, MANIFEST)
    return report


def _report(run: Run, prepared: Prepared, result: Result, weight_errors: dict[str, float]) -> Report:
    """The report before anything is evaluated."""
    recipe, loaded = run.recipe, prepared.job.loaded
    return Report(
        model=recipe.model.path,
        quantized=str(recipe.output.path),
        label=grids_label(prepared.specs),
        method=recipe.method.name,
        bits_per_weight=sizes.bits_per_weight(prepared.specs, prepared.shapes),
        float_bytes=prepared.float_bytes,
        quantized_bytes=files.folder_bytes(run.state.model),
        dtype=dtype_name(loaded.dtype),
        device=str(loaded.device),
        seed=recipe.seed,
        calibration=None if prepared.text is None else described(recipe.data),
        expected=beside_published(recipe.expected, ()),
        linears=weights.linear_records(prepared.linears, prepared.specs, weight_errors),
        series=result.series,
        lock=run.state.lock,
        **run.clock.measured(),
    )


def _manifest(run: Run, prepared: Prepared, report: Report, weight_errors: dict[str, float]) -> Manifest:
    text = prepared.text
    tokens = None if text is None else CalibrationTokens(tokens=text.tokens.shape, sha256=windows.token_hash(*text))
    assert report.label is not None
    assert report.bits_per_weight is not None
    return Manifest(
        format_version=FORMAT_VERSION,
        recipe=resolved(run.recipe),
        seed=run.recipe.seed,
        data=tokens,
        label=report.label,
        bits_per_weight=report.bits_per_weight,
        float_bytes=prepared.float_bytes,
        quantized_bytes=files.folder_bytes(run.state.model),
        series=report.series,
        weight_errors=weight_errors,
        seconds=report.seconds,
        versions=environment(),
        date=report.date,
        plan=prepared.plan,
        command=run.method.command,
        lock=run.state.lock,
        files=files.file_hashes(run.state.model, "*.safetensors"),
    )


def evaluate(recipe: Recipe, report: Report, text: Calibration | None, clock: PhaseTimer) -> Report:
    """The report with what the recipe has measured, on the checkpoint as it was written."""
    if recipe.eval is not None:
        progress.note(f"{recipe.output.path} is complete; what follows reads it")
        with clock.phase("eval", "evaluating"):
            written = load_model(recipe.model.model_copy(update={"path": str(recipe.output.path)}), quantized=True)
            reference = load_model(recipe.model)
            seen = None if text is None else CalibrationSeen(recipe.data.source, text.tokens)
            results = tasks.evaluate(written, recipe.eval, reference, recipe.seed, seen)
        found = {"results": tuple(results), "backend": recipe.eval.backend}
        report = report.model_copy(update=found | {"expected": beside_published(recipe.expected, results)})
    return report.model_copy(update=clock.measured())


def export_all(recipe: Recipe, report: Report, clock: PhaseTimer) -> Report:
    """Write every export of the recipe; the report that names them takes the place of the one before."""
    exports: list[Exported] = []
    for entry in recipe.export:
        with clock.phase(f"export {entry.format}", f"exporting {entry.format}"):
            exports.append(write_export(recipe.output.path, entry, recipe.output.overwrite))
    if exports:
        report = report.model_copy(update={"exports": tuple(exports), **clock.measured()})
        _publish(recipe.output, report)
    return report


def _publish(output: OutputConfig, report: Report) -> None:
    """Write the report in all its forms into the folder of a checkpoint."""
    report.write(output.path)
    model_card.write(output.path, report, MANIFEST)
    html.write(output.path, report, output.plots)
