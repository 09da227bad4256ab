"""Checks before the long work of a run: those that need no model, and those of the exports that a recipe asks for.

A fault of the recipe is reported before the model is quantized, not after hours of work.
"""

from collections import Counter

from qtool.allocation import plan as bit_plan
from qtool.blocks.job import load_method
from qtool.checkpoints import output_folder
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.recipe import Recipe
from qtool.config.sections import ExportConfig
from qtool.config.training import EndToEndConfig, TrainedConfig
from qtool.data import sources
from qtool.evaluation import tasks
from qtool.exporters import _base
from qtool.models.folders import resolve
from qtool.system import distributed
from qtool.system.errors import InputError
from qtool.training import sharding
from qtool.training.plan import plan_of


def check_early(recipe: Recipe) -> None:
    """Check everything in a recipe that can be checked without the model.

    Raises:
        InputError: the number of processes, the data, a task or a folder cannot be used.
    """
    if distributed.world_size() > 1 and not load_method(recipe.method.name).end_to_end(recipe.method):
        count = distributed.world_size()
        raise InputError(f"method {recipe.method.name} runs in one process, but {count} were started")
    if isinstance(recipe.method, TrainedConfig) and recipe.method.init_from is not None:
        NativeCheckpoint(resolve(recipe.method.init_from, key="method.init_from"))
    for where, section in (("method", recipe.method), *((f"method.{key}", value) for key, value in recipe.method)):
        if isinstance(section, EndToEndConfig):
            sharding.check(section)
            plan_of(section, recipe.data.num_samples, where)
    if recipe.quant.budget is not None:
        bit_plan.check(recipe.quant)
    if needs_text(recipe):
        sources.check_source(recipe.data)
    if recipe.eval is not None:
        tasks.check_tasks(recipe.eval)
    paths = [recipe.output.path, *(entry.path for entry in recipe.export)]
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise InputError(f"{path} is named {count} times as an output folder; give each output a folder of its own")
    for entry in recipe.export:
        output_folder.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


def needs_text(recipe: Recipe) -> bool:
    """Return whether a run reads calibration text, for its method or to choose bit widths."""
    return load_method(recipe.method.name).needs_data(recipe.method) or recipe.quant.budget is not None


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
