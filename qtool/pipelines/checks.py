"""Checks of a run before its long work: what is refused without the model, and exports that cannot be."""

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


def check_early(recipe: Recipe) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: processes, data, tasks or folders that cannot be used.
    """
    if distributed.world_size() > 1 and not load_method(recipe.method.name).end_to_end(recipe.method):
        raise InputError(f"method {recipe.method.name} runs in one process, and there are {distributed.world_size()}")
    if isinstance(recipe.method, TrainedConfig) and recipe.method.init_from is not None:
        NativeCheckpoint(resolve(recipe.method.init_from, key="method.init_from"))
    for section in (recipe.method, *dict(recipe.method).values()):
        if isinstance(section, EndToEndConfig):
            sharding.check(section)
    if recipe.quant.budget is not None:
        bit_plan.check(recipe.quant)
    if needs_text(recipe):
        sources.check_source(recipe.data)
    if recipe.eval is not None:
        tasks.check_tasks(recipe.eval)
    paths = [recipe.output.path, *(entry.path for entry in recipe.export)]
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise InputError(f"{path} is named {count} times as an output folder; give each its own")
    for entry in recipe.export:
        output_folder.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


def needs_text(recipe: Recipe) -> bool:
    """Return whether calibration text is read: by the method, or to choose widths."""
    return load_method(recipe.method.name).needs_data(recipe.method) or recipe.quant.budget is not None


def check_exports(recipe: Recipe, planned: NativeCheckpoint) -> None:
    """Refuse an export of the recipe that cannot hold the checkpoint that it is about to make.

    Raises:
        InputError: with the reason.
    """
    for entry in recipe.export:
        check_export(planned, entry, recipe.model.path)


def check_export(source: NativeCheckpoint, entry: ExportConfig, what: str) -> None:
    """Refuse an export of ``source``, called ``what``, that cannot be.

    Raises:
        InputError: with the reason.
    """
    reason = _base.refusal(entry.format, source, entry)
    if reason is not None:
        raise InputError(f"{what} cannot be exported as {entry.format}: {reason}")
