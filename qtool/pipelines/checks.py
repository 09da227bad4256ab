"""Checks before the long work of a run: those that need no model, and those of the exports that a recipe asks for.

A fault of the recipe is reported before the model is quantized, not after hours of work.
"""

from collections.abc import Callable, Mapping, Sequence

from qtool.allocation import k_mixture
from qtool.allocation import plan as bit_plan
from qtool.allocation.sensitivity import COST_ESTIMATORS
from qtool.blocks.job import load_method
from qtool.blocks.shares import check_enough
from qtool.checkpoints import output_folder
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.recipe import Recipe
from qtool.config.sections import ExportConfig
from qtool.config.training import EndToEndConfig, TrainedConfig
from qtool.data import sources
from qtool.data.windows import Calibration
from qtool.evaluation import tasks
from qtool.exporters import _base
from qtool.models.described import described_model
from qtool.models.folders import resolve
from qtool.pipelines import target, tracking
from qtool.pipelines.export_manifest import exported_already
from qtool.pipelines.run_state import read_lock
from qtool.system import distributed, progress
from qtool.system.errors import InputError, listing
from qtool.system.paths import expand
from qtool.training import sharding
from qtool.training.end_to_end import check_batch
from qtool.training.plan import plan_of


def check_early(recipe: Recipe, before: Sequence[str] = (), *, output: bool = False) -> None:
    """Check everything in a recipe that can be checked without the model, and tell all faults at once.

    ``before`` are faults that were found already. If there is a fault, those of shapes are looked for too, and with
    ``output`` those of the output folder, which are otherwise found later and cost more.

    Raises:
        InputError: the number of processes, the data, a task or a folder cannot be used.
    """
    found = [*before]
    for check in (_check_processes, _check_method, _check_text, _check_tasks, check_paths, _check_exports):
        found += _faults(lambda check=check: check(recipe))  # type: ignore[misc] # mypy does not infer the default
    if found and not before:  # else the model or the grids are at fault already
        found += _faults(lambda: _check_shapes(recipe))
    if found and output and read_lock(output_folder.partial_of(recipe.output.path)) is None:
        found += _faults(lambda: _check_output(recipe))
    _refuse(found)


def check_output(recipe: Recipe, *, fresh: bool) -> None:
    """Check the output folder of a run that continues no other; of one at fault, tell those of shapes too.

    Raises:
        InputError: the folder may not be written or replaced.
    """
    if fresh or read_lock(output_folder.partial_of(recipe.output.path)) is None:
        found = _faults(lambda: _check_output(recipe))
        _refuse([*found, *(_faults(lambda: _check_shapes(recipe)) if found else ())])


def _faults(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []


def _refuse(faults: Sequence[str]) -> None:
    """Raise an error with all faults, of which none is told twice."""
    lines = [fault.replace("\n", "\n  ") for fault in dict.fromkeys(faults)]
    if lines:
        raise InputError(listing(f"this run has {len(lines)} faults:", lines) if len(lines) > 1 else faults[0])


def _check_processes(recipe: Recipe) -> None:
    processes = distributed.world_size()
    if processes > 1 and recipe.model.free:
        raise InputError(f"model.free runs in one process, but {processes} were started; start it without a launcher")


def _check_method(recipe: Recipe) -> None:
    if isinstance(recipe.method, TrainedConfig) and recipe.method.init_from is not None:
        NativeCheckpoint(resolve(recipe.method.init_from, key="method.init_from"))
    for where, section in (("method", recipe.method), *((f"method.{key}", value) for key, value in recipe.method)):
        if isinstance(section, EndToEndConfig):
            sharding.check(section)
            plan_of(section, recipe.data.num_samples, where)
            check_batch(section.batch_size, where)
    tracking.check(recipe.tracker)
    if recipe.quant.budget is not None:
        bit_plan.check(recipe.quant)


def _check_text(recipe: Recipe) -> None:
    if needs_text(recipe):
        sources.check_source(recipe.data)
        check_enough(recipe.data.num_samples, distributed.world_size())


def _check_tasks(recipe: Recipe) -> None:
    if recipe.eval is not None:
        tasks.check_tasks(recipe.eval)


def _check_exports(recipe: Recipe) -> None:
    for entry in recipe.export:
        if exported_already(recipe.output.path, entry) is None:
            output_folder.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


def _check_output(recipe: Recipe) -> None:
    output_folder.check_folder(recipe.output.path, overwrite=recipe.output.overwrite, source=None)


def _check_shapes(recipe: Recipe) -> None:
    """Check that each linear and table can have its grid, from ``config.json`` alone."""
    if recipe.model.free:
        return
    loaded = described_model(recipe.model)
    with progress.use(progress.Sink()):  # the run itself says what it makes of a mixture
        quant = k_mixture.quant_of(recipe, loaded)
    target.selection(loaded, quant if quant.budget is None else bit_plan.narrowest(quant))


def check_paths(recipe: Recipe) -> None:
    """Check every path that a run writes against every path that it reads or writes; links are followed.

    Raises:
        InputError: two of them are the same, or one lies in the other.
    """
    output = recipe.output.path
    writes = {"output.path": output, "output.path (unfinished)": output_folder.partial_of(output)}
    for index, entry in enumerate(recipe.export):
        writes[f"export.{index}.path"] = entry.path
        writes[f"export.{index}.path (unfinished)"] = output_folder.partial_of(entry.path)
    reads = {"model.path": recipe.model.path, "data.source": recipe.data.source}
    if isinstance(recipe.method, TrainedConfig) and recipe.method.init_from is not None:
        reads["method.init_from"] = recipe.method.init_from
    there = {key: found for key, path in reads.items() if (found := expand(path, key)).exists()}
    for index, (key, path) in enumerate(writes.items()):
        if not path.name:
            raise InputError(f"{key}: {path} cannot be an output folder; give it a name")
        for other, second in [*there.items(), *list(writes.items())[:index]]:
            if output_folder.overlap(path, second):
                what = "is read" if other in there else "is written"
                raise InputError(f"{key}: {path} overlaps {other}: {second}, which {what}; choose another folder")


def needs_text(recipe: Recipe) -> bool:
    """Return whether a run reads calibration text, for its method or to choose bit widths."""
    return load_method(recipe.method.name).needs_data(recipe.method) or recipe.quant.budget is not None


def check_text(recipe: Recipe, text: Calibration, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse pictures where text is needed, and note a text of fewer tokens than each linear has input channels.

    ``shapes`` are ``(out, in)`` of the quantized linears.

    Raises:
        InputError: the text has pictures, and something in the recipe reads text only.
    """
    check_pictures(recipe, text)
    narrowest = min((columns for _, columns in shapes.values()), default=0)
    if (count := text.tokens.numel()) < narrowest:
        progress.note(
            f"the calibration text has {count} tokens, and every linear has at least {narrowest} input channels: too "
            "few to say how its inputs vary; raise data.num_samples or data.seq_len"
        )


def check_pictures(recipe: Recipe, text: Calibration) -> None:
    """Refuse pictures where a recipe trains, or measures costs on, next tokens of the whole model.

    Raises:
        InputError: the calibration text has pictures, and something in the recipe reads text only.
    """
    if not text.pictures:
        return
    budget = recipe.quant.budget
    if load_method(recipe.method.name).end_to_end(recipe.method):
        what = f"{recipe.method.name} trains the whole model, which reads text only"
    elif budget is not None and COST_ESTIMATORS[budget.estimator].whole:
        what = f"quant.budget.estimator: {budget.estimator} runs the whole model, which reads text only"
    else:
        return
    raise InputError(
        f"data.source: {recipe.data.source} holds pictures, and {what}; use text, or what goes block by block (the "
        "methods gptq, awq, smoothquant and signround, the estimators block and hessian)"
    )


def check_exports(recipe: Recipe, planned: NativeCheckpoint) -> None:
    """Check that every export of a recipe can hold the checkpoint ``planned``.

    Raises:
        InputError: an export cannot hold it, with the reason.
    """
    for entry in recipe.export:
        check_export(planned, entry, recipe.model.path)


def check_export(source: NativeCheckpoint, entry: ExportConfig, what: str) -> None:
    """Check that an export can hold the checkpoint ``source``; ``what`` names the checkpoint in the message.

    Raises:
        InputError: the export cannot hold it, with the reason.
    """
    reason = _base.refusal(entry.format, source, entry)
    if reason is not None:
        raise InputError(f"{what} cannot be exported as {entry.format}: {reason}")
