"""``qtool plan``: the bit width of each group of linears, chosen for a budget; and the plan that a run keeps.

A run keeps its plan in its folder, because a later start must use the same widths and need not measure again.
"""

from qtool.allocation import plan as bit_plan
from qtool.allocation.plan import BitPlan
from qtool.allocation.units import Unit
from qtool.blocks.job import Job
from qtool.checkpoints.files import write_durably
from qtool.config.recipe import Recipe
from qtool.data import sources, windows
from qtool.models.loading import load_model
from qtool.models.quiet import without_progress_bars
from qtool.pipelines import scale_dtype, target
from qtool.pipelines.checks import check_pictures
from qtool.pipelines.run_state import PLAN, RunState
from qtool.system import distributed, reading


@without_progress_bars()
def plan(recipe: Recipe) -> BitPlan:
    """Return the bit widths that a run of the recipe would choose for its budget. Nothing is written.

    Raises:
        InputError: the recipe has no budget, the budget cannot be met, or the recipe's target does not load the result.
    """
    bit_plan.check(recipe.quant)
    recipe = target.applied(scale_dtype.chosen(recipe))
    sources.check_source(recipe.data)
    loaded = load_model(recipe.model)
    units = bit_plan.units_of(loaded, recipe.quant)
    text = windows.calibration(recipe.data, loaded, recipe.seed)
    check_pictures(recipe, text)
    job = Job(loaded, (), text.tokens, text.labels, recipe.seed, pictures=text.pictures)
    return bit_plan.plan(job, lambda: loaded, units, recipe.quant)


def kept_plan(recipe: Recipe, state: RunState, job: Job, units: list[Unit]) -> BitPlan:
    """Return the plan of an earlier start of this run, or a new one; the first process makes it, and all read it."""
    file = state.folder / PLAN
    if distributed.is_first() and not file.exists():
        with distributed.alone():
            made = bit_plan.plan(job, lambda: load_model(recipe.model, checked=job.loaded), units, recipe.quant)
        write_durably(file, made.model_dump(mode="json"))
    distributed.barrier()
    return reading.read_typed(file, BitPlan, "pass --fresh to start over")
