"""What a run says of itself before its first block: the size of its result, the memory of its text, and its plan."""

from qtool.checkpoints import sizes
from qtool.checkpoints.native import PlannedCheckpoint
from qtool.config.recipe import Recipe
from qtool.models.config_values import config_value
from qtool.models.loaded import LoadedModel
from qtool.pipelines.checks import needs_text
from qtool.pipelines.kept_forecast import kept
from qtool.system.units import duration, size

WORTH_SAYING = 10**6  # least bytes of hidden states that are said


def in_words(recipe: Recipe, loaded: LoadedModel, planned: PlannedCheckpoint, float_bytes: int) -> str:
    """Return the line about a run that is going to make the checkpoint ``planned`` of ``float_bytes`` of weights."""
    if recipe.quant.budget is None:
        weights = f"{size(sizes.planned_bytes(loaded, planned.specs, planned.shapes))} of weights"
    else:
        weights = "weights within quant.budget"
    parts = [f"expected: {weights} (float: {size(float_bytes)})"]
    states, budget = state_bytes(recipe, loaded) if needs_text(recipe) else 0, recipe.data.memory_budget
    if states >= WORTH_SAYING:
        where = "on disk, as they exceed data.memory_budget" if states > budget else "in memory"
        parts.append(f"{size(states)} of hidden states {where}")
    plan = kept(recipe)
    if plan is None:
        return "; ".join([*parts, "qtool plan estimates time and memory"])
    return "; ".join([*parts, f"planned: {duration(sum(plan.seconds.values()))}, peak memory {size(plan.peak_bytes)}"])


def state_bytes(recipe: Recipe, loaded: LoadedModel) -> int:
    """Return the bytes of the hidden states of the calibration text, before and after a block; 0 if not known."""
    tokens = recipe.data.num_samples * recipe.data.seq_len
    width: int = config_value(loaded.model.config.get_text_config(), "hidden_size") or 0
    return 2 * tokens * width * loaded.storage_dtype.itemsize
