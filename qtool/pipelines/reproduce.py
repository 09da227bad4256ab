"""``qtool reproduce``: a checkpoint made again from its manifest, and compared tensor by tensor."""

import tempfile
from pathlib import Path

import torch

from qtool.checkpoints.files import SafetensorsFolder
from qtool.models.folders import resolve
from qtool.pipelines.lock import differences, lock_of
from qtool.pipelines.quantize import quantize
from qtool.pipelines.verify import open_checkpoint
from qtool.system import progress
from qtool.system.errors import InputError, RunError, listing


def reproduce(folder: Path) -> list[str]:
    """Run a checkpoint's recipe again beside it, and compare every tensor.

    Returns the differences of the lock, of software or machine, in spite of which the bytes are the same.

    Raises:
        InputError: the model is not what it was made with.
        RunError: naming the first block that differs.
    """
    _, manifest = open_checkpoint(folder)
    recipe = manifest.recipe_again()
    changes = differences(manifest.lock, lock_of(recipe, resolve(recipe.model.path)))
    if any(change.startswith(("model_files", "model:")) for change in changes):
        raise InputError(listing(f"{folder} was made from another model:", changes))
    for change in changes:
        progress.note(f"not as it was: {change}")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as temporary:
        again = Path(temporary) / "again"
        output = recipe.output.model_copy(update={"path": again, "overwrite": False})
        quantize(recipe.model_copy(update={"output": output, "eval": None, "export": ()}))
        if (place := _first_difference(folder, again)) is not None:
            why = f" (not as it was: {'; '.join(changes)})" if changes else ""
            raise RunError(f"{folder} came out differently; the first difference is in {place}{why}")
    return changes


def _first_difference(before: Path, now: Path) -> str | None:
    """The first tensor, in the order of the blocks, whose bytes differ."""
    old, new = SafetensorsFolder(before), SafetensorsFolder(now)
    if old.names != new.names:
        return f"the names: {min(old.names ^ new.names)}"  # type: ignore[operator] # both are sets of keys
    return next((name for name in old.names if not _same(old, new, name)), None)


def _same(old: SafetensorsFolder, new: SafetensorsFolder, name: str) -> bool:
    a, b = old.tensor(name), new.tensor(name)
    return a.dtype == b.dtype and torch.equal(a, b)
