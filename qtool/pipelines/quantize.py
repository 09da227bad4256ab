"""The pipeline: recipe -> model -> tokens -> method -> checkpoint -> evaluation -> exports.

Everything that can be refused is refused before the model is quantized. The checkpoint gets its name when it is whole;
evaluation and exports come after, and a failure there loses nothing of it.
"""

from pathlib import Path
from typing import Any

import transformers

from qtool.allocation import plan as bit_plan
from qtool.checkpoints import native, output_folder, sizes
from qtool.checkpoints.files import file_hashes, folder_bytes, write_json
from qtool.checkpoints.native import MANIFEST, Planned
from qtool.checkpoints.quantization_config import label as _label
from qtool.config import plugins
from qtool.config.recipe import Recipe, resolved
from qtool.config.sections import OutputConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.evaluation import tasks as evaluation
from qtool.evaluation import weights
from qtool.evaluation.contamination import Seen
from qtool.models.folders import resolve
from qtool.models.linears import packed_linears
from qtool.models.loading import choose_device, load_model
from qtool.pipelines.checks import check_early
from qtool.pipelines.clock import Clock
from qtool.pipelines.export import check_exports, write_export
from qtool.pipelines.lock import lock_of
from qtool.pipelines.outcome import Outcome, described, dtype_name
from qtool.pipelines.plan import kept_calibration, kept_plan, needs_text
from qtool.pipelines.run_state import run_state
from qtool.quant.packed_linear import FORMAT_VERSION
from qtool.reports import html, model_card
from qtool.reports.records import Exported, compare
from qtool.reports.report import Report
from qtool.system import distributed, progress
from qtool.system.environment import environment


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
        output_folder.check_space(output.path, float_bytes)  # never more than the float model
        check_exports(recipe, Planned(loaded, specs, shapes))
        text = allotted = None
        if needs_text(recipe):
            with clock.phase("data", f"reading calibration text: {recipe.data.source}"):
                text = kept_calibration(recipe, loaded, state)
        quant = recipe.quant
        if units is not None:
            with clock.phase("allocate", "choosing widths"):
                allotted = kept_plan(recipe, state, units, text)
            quant = allotted.applied(quant)
            specs = {target.name: target.spec for target in loaded.targets(quant)}
        del targets, units  # they hold the float linears, which a method lets go of as it replaces them
        bits = sizes.bits_per_weight(specs, shapes)
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
                output_folder.clear(state.model)  # all is in memory; what is there is of a run that was killed here
            native.save(state.model, loaded, specs)
            report = Report(
                model=recipe.model.path,
                quantized=str(output.path),
                label=_label(specs),
                method=recipe.method.name,
                bits_per_weight=bits,
                float_bytes=float_bytes,
                quantized_bytes=folder_bytes(state.model),
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
            files = file_hashes(state.model, "*.safetensors")
            write_json(state.model / MANIFEST, manifest | {"command": command, "lock": lock, "files": files})
            model_card.write(state.model, report, MANIFEST)
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
            exports.append(write_export(output.path, entry, output.overwrite))
    if exports:
        report = report.model_copy(update={"exports": tuple(exports), **clock.measured()})
        _publish(output, report)
    return Outcome(output.path, report, [Path(entry.path) for entry in exports], clock.total)


def _publish(output: OutputConfig, report: Report) -> None:
    """Write the report in all its forms into the folder of a checkpoint."""
    report.write(output.path)
    model_card.write(output.path, report, MANIFEST)
    html.write(output.path, report, output.plots)


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
