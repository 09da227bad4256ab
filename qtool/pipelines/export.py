"""``qtool export``: write a checkpoint in the format of another engine, and read it back before it gets its name."""

from pathlib import Path

from qtool.checkpoints import output_folder, written_config
from qtool.checkpoints.files import folder_bytes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.output_folder import atomic_folder
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.exporters._readback import read_back
from qtool.models.folders import read_config
from qtool.models.quiet import without_progress_bars
from qtool.pipelines.checks import check_export
from qtool.pipelines.export_manifest import exported_already, write_manifest
from qtool.pipelines.manifest import read_manifest
from qtool.pipelines.ways import ways
from qtool.reports import model_card
from qtool.reports.base_card import base_card
from qtool.reports.document import Table
from qtool.reports.records import Exported
from qtool.reports.report import read_report, results_table
from qtool.system import progress
from qtool.system.errors import InputError


def export(folder: Path, config: ExportConfig, overwrite: bool) -> Path:
    """Export the native checkpoint in ``folder``; return the folder of the export.

    Raises:
        InputError: ``folder`` is no native checkpoint, or the format cannot hold it exactly.
        RunError: the export, read back, differs from the checkpoint.
    """
    return Path(write_export(folder, config, overwrite, anew=overwrite).path)


@without_progress_bars()
def write_export(folder: Path, config: ExportConfig, overwrite: bool, anew: bool = False) -> Exported:
    """Like ``export``; return the record of a report.

    Unless ``anew`` is set, an export of the same checkpoint that is there already, unchanged, is not made again: so a
    command that was killed after it goes on.
    """
    source, manifest = NativeCheckpoint(folder), read_manifest(folder)
    exporter = _base.get(config.format)
    check_export(source, config, str(folder))
    if not anew and (exported := exported_already(folder, config)) is not None:
        progress.say(f"{config.path} is this export already, complete and unchanged")
        output_folder.OutputFolder(config.path).clear_abandoned()
        return exported
    with atomic_folder(config.path, overwrite=overwrite, source=folder) as partial:
        notes = exporter.write(source, partial, config) + written_config.notes(read_config(partial))
        may_round = exporter.dtype_may_round and config.dtype != "auto"
        differences = read_back(source, partial, exporter, may_round=may_round)
        card = base_card(folder, folder.name, quantized=False)
        model_card.write_export(
            partial,
            base=manifest.recorded.model.path if manifest else folder.name,
            label=manifest.label if manifest else "quantized",
            format=config.format,
            library=exporter.library,
            notes=notes,
            differences=differences,
            card=card,
            ways=ways(source, config.format, partial, multimodal=card.pipeline_tag not in (None, "text-generation")),
            measured=_measured(folder),
        )
        exported = Exported(
            format=config.format,
            path=str(config.path),
            num_bytes=folder_bytes(partial, exporter.weight_files),
            notes=tuple(notes),
            loading=exporter.loading,
            **differences,
        )
        write_manifest(partial, source, config, exported)
    for note in notes:
        progress.note(f"{config.format}: {note}")
    return exported


def _measured(folder: Path) -> Table | None:
    """Return the table of what was measured with a checkpoint; ``None`` without such a report."""
    try:
        report = read_report(folder)
    except InputError:
        return None
    return results_table(report) if report is not None and report.results else None
