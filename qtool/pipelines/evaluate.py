"""``qtool eval``: measure a native, exported or plain model, and beside it the float model that it was made from."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtool.checkpoints import files, sizes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.output_folder import is_marked
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.gate import GateConfig
from qtool.config.recipe import EvalRecipe
from qtool.config.sections import EvalConfig, ExpectedConfig, ModelConfig
from qtool.config.yaml_loader import dump
from qtool.data import sources, windows
from qtool.evaluation import tasks, weights
from qtool.evaluation.contamination import CalibrationSeen
from qtool.evaluation.continuations import continuations
from qtool.exporters._base import recognised
from qtool.exporters._readback import load_exported
from qtool.models.auto_class import is_multimodal
from qtool.models.folders import resolve
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.shared import share_equal
from qtool.pipelines.clock import PhaseTimer
from qtool.pipelines.in_memory import check_vocabularies, in_memory
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.pipelines.outcome import Outcome, described
from qtool.reports import html
from qtool.reports.gate import verdict
from qtool.reports.records import CalibrationText, beside_published
from qtool.reports.report import JSON_NAME, MARKDOWN_NAME, PLOTS_FOLDER, Report, read_report
from qtool.system import progress, writing
from qtool.system.environment import machine
from qtool.system.errors import InputError
from qtool.system.tensors import dtype_name

NO_GATE = GateConfig()


@without_progress_bars()
def evaluate(
    model: ModelConfig,
    config: EvalConfig,
    *,
    gate: GateConfig = NO_GATE,
    float_model: str | None = None,
    output: Path | None = None,
    seed: int = 0,
    expected: Sequence[ExpectedConfig] = (),
    plots: bool = False,
) -> Outcome:
    """Measure a native, exported or plain model, and beside it its float model, if that is known and available.

    A ``gate`` needs the float model; its verdict is in the report, whatever it is. ``expected`` are published numbers
    to compare with; by default those in the recipe of a native checkpoint. With ``plots`` the figures of the report are
    also written as files.

    Raises:
        InputError: a task, the model or the output folder cannot be used, or ``kl`` or a gate has no float model.
    """
    timer = PhaseTimer()
    tasks.check_tasks(config)
    folder = resolve(model.path, key="TARGET")
    manifest = read_manifest(folder)
    origin = float_model or (manifest.recorded.model.path if manifest else None)
    if gate.asked and origin is None:
        raise InputError(
            f"gate: a loss is relative to a float model, and {model.path} does not name the one it was made from; name "
            "it with --float-model"
        )
    tasks.check_reference(config, model.path, "its folder does not name it" if origin is None else None)
    if output is not None:
        make_folder(output)
    with timer.phase("load", f"loading {model.path}"):
        reference = _reference(origin, model, config, required=float_model is not None or gate.asked)
        loaded = load_exported(model) or load_model(model, quantized=True)
        if reference is not None:
            share_equal(loaded, reference)
    with timer.phase("eval", "evaluating"):
        results = tasks.evaluate(loaded, config, reference, seed, _seen(manifest, loaded, config))
        texts = continuations(loaded, config, reference)
    report = _report(model.path, folder, origin, manifest, loaded)
    published = expected or (manifest.recorded.expected if manifest else ())
    measured = {
        "float_bytes": reference.num_bytes if reference else None,
        "results": tuple(results),
        "continuations": texts,
        "expected": beside_published(published, results),
        "backend": config.backend if packed_linears(loaded.model) else None,
        "seed": seed,
    }
    report = report.model_copy(update=measured | timer.measured())
    report = report.model_copy(update={"gate": verdict(gate, report.shown())})
    if output is not None:
        report.write(output)
        html.write(output, report, plots)
    return Outcome(output, report, [], timer.total)


def evaluate_in_memory(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: EvalRecipe,
    output: Path | None,
) -> Report:
    """Return the report of a model in memory, and write it into the folder ``output``."""
    if tokenizer is None:
        raise InputError("tokenizer: a model in memory is measured with its tokenizer, and none was given")
    loaded = in_memory(model, tokenizer)
    other = None if reference is None else in_memory(reference, tokenizer, "reference")
    if other is not None:
        check_vocabularies(loaded.model, other.model)
    tasks.check_tasks(recipe.eval)
    tasks.check_reference(recipe.eval, loaded.path, "none was given" if other is None else None)
    if output is not None:
        make_folder(output)
    results = tasks.evaluate(loaded, recipe.eval, other, recipe.seed)
    report = Report(
        model=loaded.path,
        results=tuple(results),
        continuations=continuations(loaded, recipe.eval, other),
        dtype=dtype_name(loaded.dtype),
        device=str(loaded.device),
        backend=recipe.eval.backend if packed_linears(loaded.model) else None,
        seed=recipe.seed,
        machine=machine(),
    )
    if output is not None:
        report.write(output)
        html.write(output, report)
    return report


def make_folder(output: Path) -> None:
    """Make the folder of a report, before anything is measured.

    Raises:
        InputError: it cannot be made, or holds such files that qtool did not write.
    """
    ours = is_marked(output)
    with suppress(InputError):
        ours = ours or read_report(output) is not None
    writing.make_folder(output, (JSON_NAME, MARKDOWN_NAME, html.HTML_NAME, PLOTS_FOLDER), ours=ours)


def _report(path: str, folder: Path, origin: str | None, manifest: Manifest | None, loaded: LoadedModel) -> Report:
    """Return the report of the model at ``path``, before it is measured; ``origin`` is its float model."""
    dtype, device = dtype_name(loaded.dtype), str(loaded.device)
    if manifest is None:
        if origin is None:
            return Report(model=path, dtype=dtype, device=device)
        exporter = recognised(folder)
        size = files.folder_bytes(folder, exporter.weight_files) if exporter else files.folder_bytes(folder)
        return Report(model=origin, dtype=dtype, device=device, quantized=path, quantized_bytes=size)
    source = NativeCheckpoint(folder)
    return Report(
        model=origin or path,
        dtype=dtype,
        device=device,
        quantized=path,
        label=grids_label(source.specs, source.tables),
        method=manifest.recorded.method.name,
        bits_per_weight=sizes.linear_bits(source),
        file_bits_per_weight=sizes.file_bits(source),
        quantized_bytes=source.num_bytes(),
        calibration=_calibration(manifest),
        multimodal=is_multimodal(loaded.model.config),
        linears=weights.linear_records(weights.block_linears(loaded), source, manifest.weight_errors),
        tables=weights.table_records(loaded, source, manifest.weight_errors),
        series=manifest.series,
        lock=manifest.lock,
        command=manifest.command,
        recipe=_recipe(folder, manifest),
    )


def _calibration(manifest: Manifest) -> CalibrationText | None:
    data = manifest.data
    return None if data is None else described(manifest.recorded.data, data.rendering, data.num_learned)


def _recipe(folder: Path, manifest: Manifest) -> str:
    """Return the recipe of a checkpoint as YAML: as it was given, if its report has that, else with every default."""
    with suppress(InputError):
        if (report := read_report(folder)) is not None and report.recipe is not None:
            return report.recipe
    return dump(manifest.recipe)


def _seen(manifest: Manifest | None, loaded: LoadedModel, config: EvalConfig) -> CalibrationSeen | None:
    """Return the calibration text of a checkpoint; without tokens, if reading it again is costly or gives others."""
    if manifest is None or manifest.data is None or not set(config.tasks) & set(tasks.OWN_TASKS):
        return None
    recorded = manifest.recorded.data
    try:
        if not sources.is_local(recorded):
            return CalibrationSeen(recorded.source, None)
        text = windows.calibration(recorded, loaded, manifest.seed)
        if windows.token_hash(*text) != manifest.data.sha256:
            raise InputError(f"{recorded.source} has changed since the checkpoint was made")
    except InputError as error:
        progress.note(f"the overlap with the calibration text is not measured: {error}")
        return CalibrationSeen(recorded.source, None)
    return CalibrationSeen(recorded.source, text.tokens)


def _reference(path: str | None, model: ModelConfig, config: EvalConfig, *, required: bool) -> LoadedModel | None:
    """Return the float model; ``None`` and a note if nothing that is asked for needs it and it cannot be loaded.

    Raises:
        InputError: it cannot be loaded, and is ``required`` or a task needs it.
    """
    if path is None:
        return None
    try:
        return load_model(model.model_copy(update={"path": path}))
    except InputError as error:
        if required:
            raise
        tasks.check_reference(config, model.path, f"that cannot be loaded ({error})")
        progress.note(f"the float model is not measured: {error}")
        return None
