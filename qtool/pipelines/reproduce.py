"""Whether a checkpoint is what its manifest says, and whether making it again gives the same bytes."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qtool.checkpoints.native import MANIFEST, Files, Source, bits_per_weight, file_hashes
from qtool.config.recipe import Recipe
from qtool.models.folders import resolve
from qtool.pipelines.quantize import lock_of, quantize
from qtool.pipelines.run_state import differences
from qtool.system import progress
from qtool.system.errors import InputError, RunError


def verify(folder: Path) -> dict[str, Any]:
    """Hash every safetensors file again and compare what the manifest says with what the tensors are.

    Returns how many files and quantized linears were checked.

    Raises:
        InputError: no checkpoint of ours with a manifest that names its files.
        RunError: naming everything that differs.
    """
    source, manifest = _opened(folder)
    found = file_hashes(folder, "*.safetensors")
    faults = [
        f"{name} is missing" if name not in found else f"{name} was changed after it was written"
        for name, expected in manifest["files"].items()
        if found.get(name) != expected
    ]
    faults += [f"{name} is not in the manifest" for name in sorted(found.keys() - manifest["files"].keys())]
    if not faults:
        for name in source.specs:
            source.quantized(name)  # refuses what does not fit its grid
        shapes = {name: tuple(source.tensor(f"{name}.weight_shape").tolist()) for name in source.specs}
        bits = bits_per_weight(source.specs, shapes)
        if bits != manifest["bits_per_weight"]:
            faults.append(f"it has {bits} bits per weight, and the manifest says {manifest['bits_per_weight']}")
    if faults:
        raise RunError("\n  ".join([f"{folder} is not as it was written:", *faults]))
    return {"files": len(found), "linears": len(source.specs), "bits_per_weight": manifest["bits_per_weight"]}


def reproduce(folder: Path) -> dict[str, Any]:
    """Run a checkpoint's recipe again beside it, and compare every tensor.

    Raises:
        InputError: the model, the software or the machine is not what it was made with.
        RunError: naming the first block that differs.
    """
    _, manifest = _opened(folder)
    recipe = Recipe.model_validate(manifest["recipe"])
    now = json.loads(json.dumps(lock_of(recipe, resolve(recipe.model.path))))
    changes = list(differences(manifest["lock"], now))
    if any(change.startswith(("model_files", "model:")) for change in changes):
        raise InputError("\n  ".join([f"{folder} was made from another model:", *changes]))
    for change in changes:
        progress.note(f"not as it was: {change}")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as temporary:
        again = Path(temporary) / "again"
        output = recipe.output.model_copy(update={"path": again, "overwrite": False})
        quantize(recipe.model_copy(update={"output": output, "eval": None, "export": ()}), manifest["command"])
        if (place := _first_difference(folder, again)) is not None:
            why = f" (not as it was: {'; '.join(changes)})" if changes else ""
            raise RunError(f"{folder} came out differently; the first difference is in {place}{why}")
    return {"same": True, "changes": changes}


def _opened(folder: Path) -> tuple[Source, dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that qtool wrote")
    source = Source(folder)
    manifest = source.manifest
    if "files" not in manifest:
        raise InputError(f"{folder} has no {MANIFEST} that lists its files; only what qtool wrote itself has one")
    return source, manifest


def _first_difference(before: Path, now: Path) -> str | None:
    """The first tensor, in the order of the blocks, whose bytes differ."""
    old, new = Files(before), Files(now)
    if old.names != new.names:
        return f"the names: {min(old.names ^ new.names)}"  # type: ignore[operator] # both are sets of keys
    return next((name for name in old.names if not _same(old, new, name)), None)


def _same(old: Files, new: Files, name: str) -> bool:
    a, b = old.tensor(name), new.tensor(name)
    return a.dtype == b.dtype and torch.equal(a, b)
