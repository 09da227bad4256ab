"""The manifest of an export, ``qtool_export.json``: the checkpoint it was made from, and the hashes of its files.

It is written last. It marks the folder as written by qtool, so that ``--overwrite`` may replace it, and lets a run that
was killed after an export know that the export is complete.
"""

import glob
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

from qtool.checkpoints import side_files
from qtool.checkpoints.files import changed_files, file_hashes, write_json
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint
from qtool.config import catalog
from qtool.config.sections import ExportConfig
from qtool.reports.records import Exported, FileName, FilePath, Sha256
from qtool.system import reading
from qtool.system.errors import InputError
from qtool.system.version import __version__

EXPORT_MANIFEST = "qtool_export.json"
VERIFIED = "qtool_verified.json"  # what qtool verify found of an export, written after it
FORMAT_VERSION = 1


class ExportManifest(BaseModel):
    """The content of ``qtool_export.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int
    qtool: str  # version of qtool that wrote the export
    dtype: str  # the dtype that was asked for, or auto
    source: dict[FileName, Sha256]  # SHA-256 of the files of the checkpoint with weights and config
    exported: Exported  # the record of the report
    files: dict[FilePath, Sha256]  # SHA-256 of the files of the export, but for this one

    @field_validator("exported")
    @classmethod
    def _known(cls, exported: Exported) -> Exported:
        if exported.format not in catalog.export_formats():
            raise ValueError(f"format {exported.format!r} is none of {', '.join(catalog.export_formats())}")
        return exported


def write_manifest(folder: Path, source: NativeCheckpoint, config: ExportConfig, exported: Exported) -> None:
    """Write the manifest of the complete export in ``folder``."""
    manifest = ExportManifest(
        format_version=FORMAT_VERSION,
        qtool=__version__,
        dtype=config.dtype,
        source=_source_files(source.folder),
        exported=exported,
        files=files_of(folder),
    )
    write_json(folder / EXPORT_MANIFEST, manifest.model_dump(mode="json"))


def read_export_manifest(folder: Path) -> ExportManifest | None:
    """Return the manifest of an export; ``None`` if the folder has none.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return reading.read_typed(folder / EXPORT_MANIFEST, ExportManifest, "remove it, or export again")
    except FileNotFoundError:
        return None


def exported_already(source: Path, config: ExportConfig) -> Exported | None:
    """Return the record of the export ``config`` of the checkpoint ``source``, if it is there and unchanged."""
    try:
        manifest = read_export_manifest(config.path)
    except InputError:
        return None
    if manifest is None or (manifest.exported.format, manifest.dtype) != (config.format, config.dtype):
        return None
    if manifest.source != _source_files(source) or changed_files(manifest.files, files_of(config.path)):
        return None
    return manifest.exported.model_copy(update={"path": str(config.path)})


def files_of(folder: Path, known: Collection[str] | None = None) -> dict[str, str]:
    """Return the hashes of the files of an export, by their paths below ``folder``.

    Its manifest, its model card, which a user may edit, and the record of ``qtool verify`` are left out. Files that are
    not ``known`` are not read: they have no hash.
    """
    files = {file.name for file in folder.iterdir() if file.is_file()} - {EXPORT_MANIFEST, VERIFIED, "README.md"}
    names = files | {name for name in side_files.names(folder) if "/" in name}
    read = names if known is None else names & set(known)
    return dict.fromkeys(names, "") | file_hashes(folder, *map(glob.escape, read))


def _source_files(folder: Path) -> dict[str, str]:
    """Return the hash of a checkpoint's manifest, which has those of its files; without one, those of weights."""
    return file_hashes(folder, MANIFEST) or file_hashes(folder, "*.safetensors", "config.json")
