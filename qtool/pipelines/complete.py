"""Whether a run is over: its folder holds what its recipe asks for, so that the same command has nothing to do."""

from qtool.checkpoints.output_folder import OutputFolder, partial_of
from qtool.config.recipe import Recipe, resolved
from qtool.pipelines.export_manifest import exported_already
from qtool.pipelines.lock import differences, unlocked
from qtool.pipelines.manifest import read_manifest
from qtool.pipelines.run_state import read_lock
from qtool.pipelines.verify import verify
from qtool.reports.records import Lock
from qtool.reports.report import Report, read_report
from qtool.system.errors import InputError


def complete_already(recipe: Recipe, lock: Lock) -> Report | None:
    """Return the report of an earlier run of the same recipe that ended; ``None`` if there is something left to do."""
    output = recipe.output
    if output.overwrite or not output.path.is_dir() or read_lock(partial_of(output.path)) is not None:
        return None
    try:
        manifest, report = read_manifest(output.path), read_report(output.path)
    except InputError:
        return None
    if manifest is None or report is None or differences(manifest.lock, lock):
        return None
    if unlocked(manifest.recipe) != unlocked(resolved(recipe)):
        return None
    if (recipe.eval is not None and not report.results) or len(report.exports) != len(recipe.export):
        return None
    if not all(exported_already(output.path, entry) for entry in recipe.export):
        return None
    verify(output.path)
    OutputFolder(output.path).clear_abandoned()
    return report
