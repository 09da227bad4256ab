"""What a pipeline returns: the result's folder, the report, the exports, and the time taken."""

from dataclasses import dataclass
from pathlib import Path

from qtool.config.sections import DataConfig
from qtool.reports.records import CalibrationText
from qtool.reports.report import Report


@dataclass
class Outcome:
    """What a command made: the folder of its result, the report, the exports, and how long it took."""

    path: Path | None
    report: Report
    exports: list[Path]
    seconds: float


def described(config: DataConfig) -> CalibrationText:
    """A data section as reports have it."""
    return CalibrationText(source=config.source, num_samples=config.num_samples, seq_len=config.seq_len)
