"""Checks before the long work of a run: those that need no model, and those of the exports that a recipe asks for.

A fault of the recipe is reported before the model is quantized, not after hours of work.
"""

from collections.abc import Mapping

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
from qtool.models.folders import resolve
from qtool.pipelines import tracking
from qtool.pipelines.export_manifest import exported_already
from qtool.system import distributed, progress
from qtool.system.errors import InputError
from qtool.system.paths import expand
from qtool.training import sharding
from qtool.training.end_to_end import check_batch
from qtool.training.plan import plan_of


def check_early(recipe: Recipe) -> None:
    """Check everything in a recipe that can be checked without the model.

    Raises:
        InputError: the number of processes, the data, a task or a folder cannot be used.
    """
    processes = distributed.world_size()
    if processes > 1 and recipe.model.free:
        raise InputError(f"model.free runs in one process, but {processes} were started; start it without a launcher")
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
    if needs_text(recipe):
        sources.check_source(recipe.data)
        check_enough(recipe.data.num_samples, processes)
    if recipe.eval is not None:
        tasks.check_tasks(recipe.eval)
    check_paths(recipe)
    for entry in recipe.export:
        if exported_already(recipe.output.path, entry) is None:
            output_folder.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


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
