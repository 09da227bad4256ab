"""``qtool plan``: the bit widths that a budget comes to; and the plan that a run keeps."""

import transformers

from qtool.allocation import plan as bit_plan
from qtool.allocation.plan import Plan
from qtool.allocation.sensitivity import Unit
from qtool.checkpoints.files import write_durably
from qtool.config import plugins
from qtool.config.recipe import Recipe
from qtool.data import sources, windows
from qtool.data.windows import Calibration
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines.run_state import PLAN, RunState
from qtool.system import distributed


def needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read: for the method, or to choose widths."""
    return plugins.get(recipe.method.name).needs_data(recipe.method) or recipe.quant.budget is not None


def plan(recipe: Recipe) -> Plan:
    """The widths that the budget of a recipe comes to, as a run of it would choose them. Nothing is written.

    Raises:
        InputError: the recipe has no budget, or one that cannot be met.
    """
    transformers.logging.disable_progress_bar()
    bit_plan.check(recipe.quant)
    sources.check_source(recipe.data)
    loaded = load_model(recipe.model)
    units = bit_plan.units_of(loaded, recipe.quant)
    text = windows.calibration(recipe.data, loaded, recipe.seed)
    return bit_plan.plan(loaded, lambda: loaded, units, recipe.quant, text)


def kept_plan(recipe: Recipe, state: RunState, units: list[Unit], text: Calibration | None) -> Plan:
    """The plan of the earlier start of this run, or a new one, made by the first process and read by all."""
    file = state.folder / PLAN
    if distributed.is_first() and not file.exists():
        assert state.loaded is not None
        made = bit_plan.plan(state.loaded, lambda: load_model(recipe.model), units, recipe.quant, text)
        write_durably(file, made.model_dump(mode="json"))
    distributed.wait()
    return Plan.model_validate_json(file.read_bytes())


def kept_calibration(recipe: Recipe, loaded: LoadedModel, state: RunState) -> Calibration:
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
