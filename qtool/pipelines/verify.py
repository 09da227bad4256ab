"""``qtool verify``: whether a checkpoint's files are what its manifest says."""

from pathlib import Path
from typing import NamedTuple

from qtool.checkpoints.files import file_hashes
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint
from qtool.checkpoints.sizes import bits_per_weight
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.system.errors import InputError, RunError, listing


class Verified(NamedTuple):
    """The counts of what was checked."""

    files: int
    linears: int
    bits_per_weight: float


def verify(folder: Path) -> Verified:
    """Hash every safetensors file again and compare what the manifest says with what the tensors are.

    Raises:
        InputError: no checkpoint of ours with a manifest that names its files.
        RunError: naming everything that differs.
    """
    source, manifest = open_checkpoint(folder)
    found = file_hashes(folder, "*.safetensors")
    faults = [
        f"{name} is missing" if name not in found else f"{name} was changed after it was written"
        for name, expected in manifest.files.items()
        if found.get(name) != expected
    ]
    faults += [f"{name} is not in the manifest" for name in sorted(found.keys() - manifest.files.keys())]
    if not faults:
        for name in source.specs:
            source.quantized(name)  # refuses what does not fit its grid
        bits = bits_per_weight(source.specs, source.shapes)
        if bits != manifest.bits_per_weight:
            faults.append(f"it has {bits} bits per weight, and the manifest says {manifest.bits_per_weight}")
    if faults:
        raise RunError(listing(f"{folder} is not as it was written:", faults))
    return Verified(len(found), len(source.specs), manifest.bits_per_weight)


def open_checkpoint(folder: Path) -> tuple[NativeCheckpoint, Manifest]:
    """A native checkpoint and its manifest.

    Raises:
        InputError: there is no such folder, or it has no manifest.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that qtool wrote")
    source = NativeCheckpoint(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} has no {MANIFEST} that lists its files; only what qtool wrote itself has one")
    return source, manifest
