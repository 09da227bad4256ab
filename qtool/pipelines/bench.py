"""``qtool bench``: measure speed and memory of a checkpoint, and put them into its report if that is asked for."""

from pathlib import Path

from qtool.config.sweep import BenchConfig
from qtool.evaluation import bench as measuring
from qtool.pipelines.outcome import publish
from qtool.reports.bench_report import BenchReport
from qtool.reports.report import JSON_NAME, PLOTS_FOLDER, read_report
from qtool.system.errors import InputError
from qtool.system.paths import path_text


def bench(folder: Path, device: str, options: BenchConfig, into_report: bool) -> BenchReport:
    """Measure the native checkpoint in ``folder``; with ``into_report`` also write its report again, with the result.

    Raises:
        InputError: the folder is no native checkpoint, or has no report; or sequences would be longer than the model's
            context.
    """
    report = read_report(folder) if into_report else None
    if into_report and report is None:
        raise InputError(f"--report: {folder} has no {JSON_NAME}; qtool eval {folder} -o {folder} writes one")
    measured = measuring.bench(path_text(folder), device, options)
    if report is not None:
        publish(folder, report.model_copy(update={"bench": measured}), (folder / PLOTS_FOLDER).is_dir())
    return measured
