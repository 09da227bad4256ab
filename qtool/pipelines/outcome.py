"""The outcome that ``quantize`` and ``evaluate`` return, its files, and the calibration text as reports describe it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtool.checkpoints.native import MANIFEST
from qtool.config.sections import DataConfig, ModelConfig
from qtool.data import windows
from qtool.data.windows import Calibration
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.quiet import without_progress_bars
from qtool.reports import html, model_card
from qtool.reports.records import CalibrationText
from qtool.reports.report import Report
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.system.paths import path_text


@dataclass
class Outcome:
    """The folder of a result, its report, its exports, and the time taken."""

    path: Path | None  # ``None``: nothing was written
    report: Report
    exports: list[Path]
    seconds: float

    @property
    def model(self) -> PreTrainedModel:
        """The quantized model, loaded from ``path`` when it is first asked for; its weights stay packed."""
        return self._loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the quantized model."""
        return self._loaded.tokenizer

    @cached_property
    def _loaded(self) -> LoadedModel:
        if self.path is None:
            raise InputError("nothing was written, so there is no model to load")
        with without_progress_bars():
            return load_model(ModelConfig(path=path_text(self.path)), quantized=True)

    def _repr_html_(self) -> str:
        """Return the report without figures, for a notebook."""
        return self.report._repr_html_()


def described(config: DataConfig, rendering: str | None = None, num_learned: int | None = None) -> CalibrationText:
    """Return the record of a report for the section ``data`` of a recipe."""
    return CalibrationText(
        source=config.source,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        rendering=rendering,
        num_learned=num_learned,
    )


def described_text(config: DataConfig, loaded: LoadedModel, text: Calibration) -> CalibrationText:
    """Return the record of calibration windows that were read, and note what is learned of conversations."""
    found = described(config, None if text.labels is None else windows.rendering(config, loaded), text.num_learned)
    if text.labels is not None:
        progress.note(f"data: {found.said}")
    return found


def publish(folder: Path, report: Report, plots: bool) -> None:
    """Write the report, the model card and the HTML page into the folder of a checkpoint."""
    report.write(folder)
    model_card.write(folder, report, MANIFEST, folder.name)
    html.write(folder, report, plots)
