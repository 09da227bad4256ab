"""``qtool verify``: compare the files of a checkpoint, or of an export, with its manifest."""

from pathlib import Path
from typing import NamedTuple

from qtool.checkpoints import side_files
from qtool.checkpoints.files import changed_files, file_hashes
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint
from qtool.checkpoints.sizes import linear_bits
from qtool.exporters import _base
from qtool.models.folders import check_readable
from qtool.pipelines.export_manifest import EXPORT_MANIFEST, files_of, read_export_manifest
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.system.errors import InputError, RunError, listing


class Verified(NamedTuple):
    """The counts of verified files, quantized linears and embeddings, and the bits per weight of the linears.

    An export records no bits per weight.
    """

    files: int
    linears: int
    bits_per_weight: float | None
    embeddings: int = 0

    def __str__(self) -> str:
        files, linears = f"{self.files} file(s)", f"{self.linears} quantized linears"
        return f"{files}, {linears} and {self.embeddings} embedding(s)" if self.embeddings else f"{files} and {linears}"


def verify(folder: Path) -> Verified:
    """Compare the hash of every file that a reader computes with, the codes and the bits per weight with the manifest.

    These files are weights, config, tokenizer, processors and generation config. The manifests of earlier versions list
    weights only, and then nothing else is compared. Of an export, every file but its model card is compared.

    Raises:
        InputError: the folder has no checkpoint or export of qtool, or no manifest.
        RunError: something differs; the message names all differences.
    """
    if (folder / EXPORT_MANIFEST).exists():
        return _verify_export(folder)
    source, manifest = open_checkpoint(folder)
    patterns = side_files.HASHED if "config.json" in manifest.files else ("*.safetensors",)
    found = file_hashes(folder, *patterns)
    faults = changed_files(manifest.files, found)
    if not faults:
        for name in source.specs:
            source.quantized(name)  # refuses codes that do not fit their grid
        bits = linear_bits(source)
        if bits != manifest.bits_per_weight:
            faults.append(f"it has {bits} bits per weight, but the manifest says {manifest.bits_per_weight}")
    if faults:
        raise RunError(listing(f"{folder} has changed since it was written:", faults))
    embeddings = len(source.tables.embeddings)
    return Verified(len(found), len(source.specs) - embeddings, manifest.bits_per_weight, embeddings)


def _verify_export(folder: Path) -> Verified:
    manifest = read_export_manifest(folder)
    assert manifest is not None
    check_readable(folder)
    opened = _base.get(manifest.exported.format).open(folder)
    found = files_of(folder, manifest.files)
    if faults := changed_files(manifest.files, found):
        raise RunError(listing(f"{folder} has changed since it was written:", faults))
    return Verified(len(found), len(opened.packed()), None)


def open_checkpoint(folder: Path) -> tuple[NativeCheckpoint, Manifest]:
    """Open a native checkpoint, and read its manifest.

    Raises:
        InputError: there is no such folder, or it has no manifest.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder that qtool wrote")
    source = NativeCheckpoint(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST}, which lists its files; a run of qtool writes one, save_pretrained does not"
        )
    return source, manifest
