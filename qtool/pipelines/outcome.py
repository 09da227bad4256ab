"""The outcome that ``quantize`` and ``evaluate`` return, its files, and the calibration text as reports describe it."""

from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoints.native import MANIFEST
from qtool.config.sections import DataConfig
from qtool.reports import html, model_card
from qtool.reports.records import CalibrationText
from qtool.reports.report import Report


@dataclass
class Outcome:
    """The folder of a result, its report, its exports, and the time taken."""

    path: Path | None  # ``None``: nothing was written
    report: Report
    exports: list[Path]
    seconds: float

    def _repr_html_(self) -> str:
        """Return the page of the report as a frame, for a notebook."""
        return self.report._repr_html_()


def described(config: DataConfig) -> CalibrationText:
    """Return the record of a report for the section ``data`` of a recipe."""
    return CalibrationText(source=config.source, num_samples=config.num_samples, seq_len=config.seq_len)


def publish(folder: Path, report: Report, plots: bool) -> None:
    """Write the report, the model card and the HTML page into the folder of a checkpoint."""
    report.write(folder)
    model_card.write(folder, report, MANIFEST, folder.name)
    html.write(folder, report, plots)
