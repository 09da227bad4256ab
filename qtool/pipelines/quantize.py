"""The pipeline: recipe -> model -> tokens -> method -> checkpoint -> evaluation -> exports.

Everything that can be refused is refused before the model is quantized. The checkpoint gets its name when it is whole;
evaluation and exports come after, and a failure there loses nothing of it.
"""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers

from qtool.allocation import plan as bit_plan
from qtool.allocation.plan import Plan
from qtool.allocation.sensitivity import Unit
from qtool.checkpoints import native
from qtool.checkpoints.native import MANIFEST, Planned, Source, atomic_folder, write_json
from qtool.checkpoints.quantization_config import label as _label
from qtool.config import plugins
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import FORMAT_VERSION, IMMATERIAL, ExportConfig, OutputConfig
from qtool.config.training import EndToEndConfig, TrainedConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.evaluation import tasks as evaluation
from qtool.evaluation import weights
from qtool.evaluation.contamination import Seen
from qtool.exporters import _base as formats
from qtool.exporters._readback import verify
from qtool.models.folders import check_files, resolve
from qtool.models.loading import LoadedModel, choose_device, load_model, packed_linears
from qtool.pipelines.clock import Clock
from qtool.pipelines.evaluate import Outcome, described, dtype_name
from qtool.pipelines.run_state import PLAN, RunState, run_state, write_durably
from qtool.reports import html, model_card
from qtool.reports.records import Exported, compare
from qtool.reports.report import Report
from qtool.system import distributed, progress
from qtool.system.environment import environment, processor
from qtool.system.errors import InputError
from qtool.training import sharding

LOCKED_FILES = ("*.safetensors", "config.json", "tokenizer*", "*.model", "vocab*", "merges*")
LOCKED_PACKAGES = ("qtool", "torch", "transformers", "tokenizers")


def quantize(recipe: Recipe, command: str, fresh: bool = False) -> Outcome | None:
    """Run a recipe whose method belongs to ``command``, or go on where an earlier start of it was stopped.

    ``fresh`` forgets an unfinished run. Of several processes the first one writes and evaluates; others get ``None``.

    Raises:
        InputError: anything in the recipe, the model or the data that cannot be used; nothing was written.
        RunError: the run could not be finished.
    """
    transformers.logging.disable_progress_bar()
    clock = Clock()
    method = plugins.get(recipe.method.name)
    assert method.command == command
    check_early(recipe)
    folder = resolve(recipe.model.path)
    distributed.begin(choose_device(recipe.model.device))
    lock = lock_of(recipe, folder)
    output, end_to_end = recipe.output, method.end_to_end(recipe.method)
    options: dict[str, Any] = {"overwrite": output.overwrite, "fresh": fresh, "source": folder}
    with run_state(output.path, lock, end_to_end=end_to_end, **options) as state:
        with clock.phase("load", f"loading {recipe.model.path}"):
            loaded = load_model(recipe.model, finished=state, budget=recipe.data.memory_budget)
            state.loaded = loaded
            units = None if recipe.quant.budget is None else bit_plan.units_of(loaded, recipe.quant)
            targets = loaded.targets(recipe.quant) if units is None else [t for unit in units for t in unit.targets]
        linears = weights.block_linears(loaded)
        specs = {target.name: target.spec for target in targets} if units is None else bit_plan.mixed(units)
        shapes = {target.name: target.weight_shape for target in targets}
        float_bytes = sum(p.numel() for p in loaded.model.parameters()) * loaded.storage_dtype.itemsize
        native.check_space(output.path, float_bytes)  # never more than the float model
        _check_exports(recipe, Planned(loaded, specs, shapes))
        text = allotted = None
        if _needs_text(recipe):
            with clock.phase("data", f"reading calibration text: {recipe.data.source}"):
                text = _calibration(recipe, loaded, state)
        quant = recipe.quant
        if units is not None:
            with clock.phase("allocate", "choosing widths"):
                allotted = _plan(recipe, state, units, text)
            quant = allotted.applied(quant)
            specs = {target.name: target.spec for target in loaded.targets(quant)}
        del targets, units  # they hold the float linears, which a method lets go of as it replaces them
        bits = native.bits_per_weight(specs, shapes)
        tokens, labels = text if text and method.needs_data(recipe.method) else (None, None)
        masked = {"labels": labels} if method.takes_labels and labels is not None else {}
        with clock.phase("quantize", f"{recipe.method.name}, {_label(specs)}"):
            series = method.run(loaded, tokens, quant, recipe.method, recipe.seed, **masked)
        distributed.end()
        if not distributed.is_first():
            return None
        assert set(packed_linears(loaded.model)) <= set(specs), "the method quantized more than its targets"
        with clock.phase("save", f"writing {output.path}"):
            if end_to_end:
                loaded.weight_errors = weights.weight_errors(loaded, recipe.model, quant)
                native.clear(state.model)  # all is in memory; what is there is of a run that was killed here
            native.save(state.model, loaded, specs)
            report = Report(
                model=recipe.model.path,
                quantized=str(output.path),
                label=_label(specs),
                method=recipe.method.name,
                bits_per_weight=bits,
                float_bytes=float_bytes,
                quantized_bytes=native.folder_bytes(state.model),
                dtype=dtype_name(loaded.dtype),
                device=str(loaded.device),
                seed=recipe.seed,
                calibration=None if text is None else described(recipe.data),
                expected=compare(recipe.expected, ()),
                linears=weights.describe(linears, specs, loaded.weight_errors),
                series=series,
                lock=lock,
                **clock.measured(),
            )
            manifest = _manifest(recipe, report, text, loaded.weight_errors)
            manifest |= {} if allotted is None else {"plan": allotted.model_dump(mode="json")}
            files = native.file_hashes(state.model, "*.safetensors")
            write_json(state.model / MANIFEST, manifest | {"command": command, "lock": lock, "files": files})
            model_card.write(state.model, report)
        del loaded
    if recipe.eval is not None:
        progress.note(f"{output.path} is complete; what follows reads it")
        with clock.phase("eval", "evaluating"):
            written = load_model(recipe.model.model_copy(update={"path": str(output.path)}), quantized=True)
            reference = load_model(recipe.model)
            seen = None if text is None else Seen(recipe.data.source, text.tokens)
            results = evaluation.evaluate(written, recipe.eval, reference, recipe.seed, seen)
            found = {"results": tuple(results), "backend": recipe.eval.backend}
            report = report.model_copy(update=found | {"expected": compare(recipe.expected, results)})
            del written, reference
    report = report.model_copy(update=clock.measured())
    _publish(output, report)
    exports: list[Exported] = []
    for entry in recipe.export:
        with clock.phase(f"export {entry.format}", f"exporting {entry.format}"):
            exports.append(_export(output.path, entry, output.overwrite))
    if exports:
        report = report.model_copy(update={"exports": tuple(exports), **clock.measured()})
        _publish(output, report)
    return Outcome(output.path, report, [Path(entry.path) for entry in exports], clock.total)


def _publish(output: OutputConfig, report: Report) -> None:
    """Write the report in all its forms into the folder of a checkpoint."""
    report.write(output.path)
    model_card.write(output.path, report)
    html.write(output.path, report, output.plots)


def lock_of(recipe: Recipe, folder: Path, model_files: dict[str, str] | None = None) -> dict[str, Any]:
    """What the bytes of the result depend on; ``model_files`` are the hashes of ``folder`` where they are known."""
    if model_files is None:
        check_files(folder)
    recipe_keys = _without(resolved(recipe), IMMATERIAL)
    return {
        **{section: recipe_keys[section] for section in ("model", "method", "quant", "data", "seed")},
        "model_files": native.file_hashes(folder, *LOCKED_FILES) if model_files is None else model_files,
        "versions": {name: version for name, version in environment().items() if name in LOCKED_PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
    }


def _without(keys: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``keys`` without those called so, in sections inside it too."""
    return {k: _without(v, names) if isinstance(v, dict) else v for k, v in keys.items() if k not in names}


def _needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read: for the method, or to choose widths."""
    return plugins.get(recipe.method.name).needs_data(recipe.method) or recipe.quant.budget is not None


def plan(recipe: Recipe) -> Plan:
    """The widths that the budget of a recipe comes to, as a run of it would choose them. Nothing is written.

    Raises:
        InputError: the recipe has no budget, or one that cannot be met.
    """
    transformers.logging.disable_progress_bar()
    bit_plan.check(recipe.quant)
    windows.check_source(recipe.data)
    loaded = load_model(recipe.model)
    units = bit_plan.units_of(loaded, recipe.quant)
    text = windows.calibration(recipe.data, loaded, recipe.seed)
    return bit_plan.plan(loaded, lambda: loaded, units, recipe.quant, text)


def _plan(recipe: Recipe, state: RunState, units: list[Unit], text: Calibration | None) -> Plan:
    """The plan of the earlier start of this run, or a new one, made by the first process and read by all."""
    file = state.folder / PLAN
    if distributed.is_first() and not file.exists():
        assert state.loaded is not None
        made = bit_plan.plan(state.loaded, lambda: load_model(recipe.model), units, recipe.quant, text)
        write_durably(file, made.model_dump(mode="json"))
    distributed.wait()
    return Plan.model_validate_json(file.read_bytes())


def _calibration(recipe: Recipe, loaded: LoadedModel, state: RunState) -> Calibration:
    """The calibration windows, made by the first process and read by all."""
    if distributed.is_first():
        if recipe.data.source != "generated":
            state.keep_tokens(*windows.calibration(recipe.data, loaded, recipe.seed))
        elif state.calibration() is None:
            # to write text a model must be whole
            state.keep_tokens(*windows.calibration(recipe.data, load_model(recipe.model), recipe.seed))
    distributed.wait()
    text = state.calibration()
    assert text is not None
    return text


def export(folder: Path, config: ExportConfig, overwrite: bool) -> Path:
    """Write one export of a native checkpoint, read back and compared before it gets its name.

    Raises:
        InputError: not a native checkpoint, or one that the format cannot hold exactly.
        RunError: what was read back differs.
    """
    return Path(_export(folder, config, overwrite).path)


def _export(folder: Path, config: ExportConfig, overwrite: bool) -> Exported:
    source = Source(folder)
    exporter = formats.get(config.format)
    _refuse(formats.refusal(config.format, source, config), config, str(folder))
    with atomic_folder(config.path, overwrite=overwrite, source=folder) as partial:
        notes = exporter.write(source, partial, config)
        differences = verify(source, partial, exporter, rounded=config.dtype != "auto" and config.format == "dense")
        model_card.write_export(partial, source, config, notes, differences)
    for note in notes:
        progress.note(f"{config.format}: {note}")
    return Exported(
        format=config.format,
        path=str(config.path),
        num_bytes=native.folder_bytes(config.path),
        notes=tuple(notes),
        **differences,
    )


def check_early(recipe: Recipe) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: processes, data, tasks or folders that cannot be used.
    """
    if distributed.count() > 1 and not plugins.get(recipe.method.name).end_to_end(recipe.method):
        raise InputError(f"method {recipe.method.name} runs in one process, and there are {distributed.count()}")
    if isinstance(recipe.method, TrainedConfig) and recipe.method.init_from is not None:
        Source(resolve(recipe.method.init_from, key="method.init_from"))
    for section in (recipe.method, *dict(recipe.method).values()):
        if isinstance(section, EndToEndConfig):
            sharding.check(section)
    if recipe.quant.budget is not None:
        bit_plan.check(recipe.quant)
    if _needs_text(recipe):
        windows.check_source(recipe.data)
    if recipe.eval is not None:
        evaluation.check_tasks(recipe.eval)
    paths = [recipe.output.path, *(entry.path for entry in recipe.export)]
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise InputError(f"{path} is named {count} times as an output folder; give each its own")
    for entry in recipe.export:
        native.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


def _check_exports(recipe: Recipe, planned: Source) -> None:
    for entry in recipe.export:
        _refuse(formats.refusal(entry.format, planned, entry), entry, recipe.model.path)


def _refuse(reason: str | None, config: ExportConfig, what: str) -> None:
    if reason is not None:
        raise InputError(f"{what} cannot be exported as {config.format}: {reason}")


def _manifest(
    recipe: Recipe,
    report: Report,
    text: Calibration | None,
    weight_errors: dict[str, float],
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "recipe": resolved(recipe),
        "seed": recipe.seed,
        "data": None if text is None else {"tokens": list(text.tokens.shape), "sha256": windows.token_hash(*text)},
        "label": report.label,
        "bits_per_weight": report.bits_per_weight,
        "float_bytes": report.float_bytes,
        "quantized_bytes": report.quantized_bytes,
        "series": report.series,
        "weight_errors": weight_errors,
        "seconds": report.seconds,
        "versions": environment(),
        "date": report.date,
    }
