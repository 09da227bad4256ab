"""``qtool reproduce``: make a checkpoint again from the recipe in its manifest, and compare tensor by tensor."""

from pathlib import Path

import torch

from qtool.checkpoints.files import SafetensorsFolder
from qtool.config.gate import GateConfig
from qtool.config.sections import TrackerConfig
from qtool.models.folders import resolve
from qtool.pipelines.lock import differences, lock_of
from qtool.pipelines.quantize import quantize
from qtool.pipelines.verify import open_checkpoint
from qtool.system import progress
from qtool.system.errors import InputError, RunError, listing
from qtool.system.scratch import temporary_folder


def reproduce(folder: Path) -> list[str]:
    """Run the recipe of a checkpoint again, in a temporary folder beside it, and compare every tensor.

    Return the differences of software and machine between the two runs, which changed no byte.

    Raises:
        InputError: the float model is not the one that the checkpoint was made from.
        RunError: the result differs; the message names the first tensor that does.
    """
    _, manifest = open_checkpoint(folder)
    recipe = manifest.recipe_again(folder)
    changes = differences(manifest.lock, lock_of(recipe, resolve(recipe.model.path)))
    if any(change.startswith(("model_files", "model:")) for change in changes):
        raise InputError(listing(f"{folder} was made from another model:", changes))
    for change in changes:
        progress.note(f"changed since the checkpoint was made: {change}")
    with temporary_folder(folder.absolute().parent) as temporary:
        again = temporary / "again"
        output = recipe.output.model_copy(update={"path": again, "overwrite": False})
        left_out = {"eval": None, "gate": GateConfig(), "target": None, "export": (), "tracker": TrackerConfig()}
        quantize(recipe.model_copy(update={"output": output, **left_out}))
        if (place := _first_difference(folder, again)) is not None:
            why = f" (changed since: {'; '.join(changes)})" if changes else ""
            raise RunError(f"the new run differs from {folder}; the first difference is in {place}{why}")
    return changes


def _first_difference(before: Path, now: Path) -> str | None:
    """Return the name of the first tensor that differs, in the order of the blocks, or ``None``."""
    old, new = SafetensorsFolder(before), SafetensorsFolder(now)
    if old.names != new.names:
        return f"the names of the tensors: {min(old.names ^ new.names)}"  # type: ignore[operator] # both are sets of keys
    return next((name for name in old.names if not _same(old, new, name)), None)


def _same(old: SafetensorsFolder, new: SafetensorsFolder, name: str) -> bool:
    a, b = old.tensor(name), new.tensor(name)
    return a.dtype == b.dtype and torch.equal(a, b)
