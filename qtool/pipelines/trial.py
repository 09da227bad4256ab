"""What a run writes at its end, tried at its beginning, so that no hours are lost to a file that cannot be written."""

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from qtool.checkpoints import native
from qtool.checkpoints.native import MANIFEST, PlannedCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config.quant import QuantSpec
from qtool.config.recipe import Recipe
from qtool.exporters import _base
from qtool.exporters._folder import stored_dtype
from qtool.models.loaded import LoadedModel
from qtool.models.tables import Tables
from qtool.reports.model_card import write as write_card
from qtool.reports.report import Report
from qtool.system.errors import InputError, first_line


def try_out(
    folder: Path,
    recipe: Recipe,
    loaded: LoadedModel,
    specs: dict[str, QuantSpec],
    shapes: dict[str, tuple[int, int]],
    tables: Tables,
) -> None:
    """Write everything but weights, of the checkpoint and of each export, below ``folder``, and remove it again.

    Raises:
        InputError: a file of the float model cannot be copied, or its tokenizer cannot be read from its copy.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        made = folder / "checkpoint"
        made.mkdir(parents=True)
        native.describe(made, loaded, specs, tables)
        _check_tokenizer(made, loaded)
        label = grids_label(specs, native.as_listed(tables))
        report = Report(model=recipe.model.path, quantized=str(recipe.output.path), label=label)
        write_card(made, report, MANIFEST, recipe.output.path.name)
        planned = PlannedCheckpoint(replace(loaded, folder=made), specs, shapes, tables)
        for index, entry in enumerate(recipe.export):
            exporter, out = _base.get(entry.format), folder / f"export {index}"
            out.mkdir()
            exporter.describe(planned, out, stored_dtype(planned) if entry.dtype == "auto" else entry.dtype)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_tokenizer(folder: Path, loaded: LoadedModel) -> None:
    """Refuse a tokenizer that reads from the copies of its files otherwise than from the float model's folder."""
    try:
        copied = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds for files that it cannot read
        raise InputError(
            f"the tokenizer of {loaded.path} cannot be read from the files that a checkpoint carries: "
            f"{first_line(error)}; save it with tokenizer.save_pretrained, and use the files that this writes"
        ) from error
    if type(copied) is not type(loaded.tokenizer) or copied.get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(
            f"the tokenizer of {loaded.path} needs files that a checkpoint does not carry, and is another one without "
            "them; save it with tokenizer.save_pretrained, and use the files that this writes"
        )
