"""``qtool verify``: whether a checkpoint's files are what its manifest says."""

from pathlib import Path
from typing import Any

from qtool.checkpoints.files import file_hashes
from qtool.checkpoints.native import MANIFEST, Source
from qtool.checkpoints.sizes import bits_per_weight
from qtool.system.errors import InputError, RunError


def verify(folder: Path) -> dict[str, Any]:
    """Hash every safetensors file again and compare what the manifest says with what the tensors are.

    Returns how many files and quantized linears were checked.

    Raises:
        InputError: no checkpoint of ours with a manifest that names its files.
        RunError: naming everything that differs.
    """
    source, manifest = opened(folder)
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


def opened(folder: Path) -> tuple[Source, dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that qtool wrote")
    source = Source(folder)
    manifest = source.manifest
    if "files" not in manifest:
        raise InputError(f"{folder} has no {MANIFEST} that lists its files; only what qtool wrote itself has one")
    return source, manifest
