"""``qtool verify``: compare the files of a checkpoint, or of an export, with its manifest.

An export can also be compared with the checkpoint it was made from, by other software, and be loaded in its engine.
"""

from pathlib import Path
from typing import NamedTuple

from qtool.checkpoints import side_files
from qtool.checkpoints.files import changed_files, file_hashes
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint
from qtool.checkpoints.sizes import linear_bits
from qtool.exporters import _base
from qtool.exporters._against import against_float, against_native, find_reader
from qtool.models.folders import check_readable, read_config
from qtool.models.quiet import without_progress_bars
from qtool.pipelines import verified
from qtool.pipelines.export_manifest import EXPORT_MANIFEST, ExportManifest, files_of, read_export_manifest
from qtool.pipelines.manifest import Manifest, read_manifest
from qtool.pipelines.verify_engine import Text, in_engine, loading, software, today
from qtool.reports.verification import Verification
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


@without_progress_bars()
def verify_export(
    folder: Path,
    *,
    against: Path | None = None,
    engine: str | None = None,
    python: Path | None = None,
    text: Text | None = None,
) -> Verification:
    """Compare the files of an export with its manifest, and then do what is asked for; what was found is recorded.

    ``against`` is the checkpoint that it was made from, or the float model: weights are compared, as the format's
    independent reader unpacks them if it is installed. ``engine`` loads the export and computes on ``text``. ``python``
    is that of the environment of the engine, or else of the reader. Without either, the result says which software
    reads the export, and what of it is installed.

    Raises:
        InputError: the folder is no export of qtool, or what is asked for cannot be done here.
        RunError: a file differs from the manifest, or the software failed.
    """
    manifest = read_export_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} is no export of qtool, which has a {EXPORT_MANIFEST}; qtool export writes one")
    format = manifest.exported.format
    exporter = _base.get(format)
    if engine is not None:
        loading(engine, format, folder)
    counts = _verify_export(folder, manifest)
    record = verified.read(folder)
    if against is not None:
        by = find_reader(exporter, python if engine is None else None)
        if (read_config(against).get("quantization_config") or {}).get("quant_method") == "qtool":
            check = against_native(folder, exporter, NativeCheckpoint(against), by, manifest.dtype)
        else:
            check = against_float(folder, exporter, against, by)
        record = record.model_copy(update={"against": check.model_copy(update={"date": today()})})
    if engine is not None:
        record = record.with_engine(in_engine(folder, format, engine, python, text or Text()))
    if against is not None or engine is not None:
        verified.write(folder, record)
    return Verification(
        path=str(folder),
        format=format,
        files=counts.files,
        linears=counts.linears,
        software=() if against is not None or engine is not None else software(format),
        against=record.against,
        engines=record.engines,
    )


def verify(folder: Path) -> Verified:
    """Compare the hash of every file that a reader computes with, the codes and the bits per weight with the manifest.

    These files are weights, config, tokenizer, processors and generation config. The manifests of earlier versions list
    weights only, and then nothing else is compared. Of an export, every file but its model card is compared.

    Raises:
        InputError: the folder has no checkpoint or export of qtool, or no manifest.
        RunError: something differs; the message names all differences.
    """
    if (folder / EXPORT_MANIFEST).exists() and (exported := read_export_manifest(folder)) is not None:
        return _verify_export(folder, exported)
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


def _verify_export(folder: Path, manifest: ExportManifest) -> Verified:
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
