"""What a pipeline returns: the result's folder, the report, the exports, and the time taken."""

from dataclasses import dataclass
from pathlib import Path

import torch

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

    def _repr_html_(self) -> str:
        """Return the page of the report as a frame, for a notebook."""
        return self.report._repr_html_()


def described(config: DataConfig) -> CalibrationText:
    """A data section as reports have it."""
    return CalibrationText(source=config.source, num_samples=config.num_samples, seq_len=config.seq_len)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
