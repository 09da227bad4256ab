"""What a run refuses before it loads the model."""

from collections import Counter

from qtool.allocation import plan as bit_plan
from qtool.checkpoints import output_folder
from qtool.checkpoints.native import Source
from qtool.config import plugins
from qtool.config.recipe import Recipe
from qtool.config.training import EndToEndConfig, TrainedConfig
from qtool.data import sources
from qtool.evaluation import tasks as evaluation
from qtool.models.folders import resolve
from qtool.pipelines.plan import needs_text
from qtool.system import distributed
from qtool.system.errors import InputError
from qtool.training import sharding


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
    if needs_text(recipe):
        sources.check_source(recipe.data)
    if recipe.eval is not None:
        evaluation.check_tasks(recipe.eval)
    paths = [recipe.output.path, *(entry.path for entry in recipe.export)]
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise InputError(f"{path} is named {count} times as an output folder; give each its own")
    for entry in recipe.export:
        output_folder.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)
