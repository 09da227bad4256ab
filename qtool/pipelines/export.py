"""``qtool export``: one checkpoint in the format of another engine, read back before it gets its name."""

from pathlib import Path

from qtool.checkpoints.files import folder_bytes
from qtool.checkpoints.native import Source
from qtool.checkpoints.output_folder import atomic_folder
from qtool.config.recipe import Recipe
from qtool.config.sections import ExportConfig
from qtool.exporters import _base as formats
from qtool.exporters._readback import verify
from qtool.reports import model_card
from qtool.reports.records import Exported
from qtool.system import progress
from qtool.system.errors import InputError


def export(folder: Path, config: ExportConfig, overwrite: bool) -> Path:
    """Write one export of a native checkpoint, read back and compared before it gets its name.

    Raises:
        InputError: not a native checkpoint, or one that the format cannot hold exactly.
        RunError: what was read back differs.
    """
    return Path(write_export(folder, config, overwrite).path)


def write_export(folder: Path, config: ExportConfig, overwrite: bool) -> Exported:
    source = Source(folder)
    exporter = formats.get(config.format)
    _refuse(formats.refusal(config.format, source, config), config, str(folder))
    with atomic_folder(config.path, overwrite=overwrite, source=folder) as partial:
        notes = exporter.write(source, partial, config)
        differences = verify(source, partial, exporter, rounded=config.dtype != "auto" and config.format == "dense")
        manifest = source.manifest
        model_card.write_export(
            partial,
            base=str(manifest["recipe"]["model"]["path"]) if manifest else source.folder.name,
            label=manifest.get("label", "quantized"),
            format=config.format,
            library=exporter.library,
            loading=exporter.loading,
            notes=notes,
            differences=differences,
        )
    for note in notes:
        progress.note(f"{config.format}: {note}")
    return Exported(
        format=config.format,
        path=str(config.path),
        num_bytes=folder_bytes(config.path),
        notes=tuple(notes),
        loading=exporter.loading,
        **differences,
    )


def check_exports(recipe: Recipe, planned: Source) -> None:
    for entry in recipe.export:
        _refuse(formats.refusal(entry.format, planned, entry), entry, recipe.model.path)


def _refuse(reason: str | None, config: ExportConfig, what: str) -> None:
    if reason is not None:
        raise InputError(f"{what} cannot be exported as {config.format}: {reason}")
