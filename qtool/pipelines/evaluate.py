"""``qtool eval``: a model of any kind measured, beside the float model that it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from qtool.checkpoints import files, sizes
from qtool.checkpoints.native import MANIFEST, Source
from qtool.checkpoints.quantization_config import label as _label
from qtool.config.sections import DataConfig, EvalConfig, ExpectedConfig, ModelConfig
from qtool.data import sources, windows
from qtool.evaluation import tasks as evaluation
from qtool.evaluation import weights
from qtool.evaluation.contamination import Seen
from qtool.exporters._readback import load_exported
from qtool.models.folders import resolve
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines.clock import Clock
from qtool.pipelines.outcome import Outcome, described, dtype_name
from qtool.reports import html
from qtool.reports.records import compare
from qtool.reports.report import Report
from qtool.system import progress
from qtool.system.errors import InputError


def evaluate(
    target: str,
    config: EvalConfig,
    model: ModelConfig,
    float_model: str | None,
    output: Path | None,
    seed: int,
    expected: Sequence[ExpectedConfig] = (),
    plots: bool = False,
) -> Outcome:
    """Measure a native, exported or plain model; beside it its float model, where that is known and there.

    Published numbers are those ``expected``, or else those that the recipe of a native checkpoint names.
    With ``plots`` the figures of the report are also written as files.

    Raises:
        InputError: a task, model or output folder that cannot be used.
    """
    transformers.logging.disable_progress_bar()
    clock = Clock()
    evaluation.check_tasks(config)
    folder = resolve(target, key="TARGET")
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{output} cannot be the folder of the report: {error.strerror}") from None
    source = Source(folder) if (folder / MANIFEST).exists() else None
    manifest = source.manifest if source is not None else {}
    origin = float_model or (manifest["recipe"]["model"]["path"] if manifest else None)
    with clock.phase("load", f"loading {target}"):
        loaded = load_exported(model) or load_model(model, quantized=True)
        reference = _reference(origin, model, required=float_model is not None)
    with clock.phase("eval", "evaluating"):
        seen = _seen(manifest, loaded, config)
        results = evaluation.evaluate(loaded, config, reference, seed, seen)
    known: dict[str, Any] = {}
    if manifest:
        recorded = manifest["recipe"]
        expected = expected or [ExpectedConfig.model_validate(each) for each in recorded.get("expected", ())]
        known["calibration"] = described(DataConfig.model_validate(recorded["data"])) if manifest["data"] else None
    if source is not None:
        shapes = {name: tuple(source.tensor(f"{name}.weight_shape").tolist()) for name in source.specs}
        known |= {
            "quantized": target,
            "label": _label(source.specs),
            "method": manifest["recipe"]["method"]["name"],
            "bits_per_weight": sizes.bits_per_weight(source.specs, shapes),
            "quantized_bytes": source.num_bytes(),
            "linears": weights.describe(weights.block_linears(loaded), source.specs, manifest.get("weight_errors", {})),
            "series": manifest["series"],
            "lock": manifest.get("lock"),
        }
    elif origin is not None:
        known = {"quantized": target, "quantized_bytes": files.folder_bytes(folder)}
    report = Report(
        model=origin or target,
        float_bytes=files.folder_bytes(reference.folder) if reference else None,
        results=tuple(results),
        expected=compare(expected, results),
        dtype=dtype_name(loaded.dtype),
        device=str(loaded.device),
        backend=config.backend if packed_linears(loaded.model) else None,
        seed=seed,
        **clock.measured(),
        **known,
    )
    if output is not None:
        report.write(output)
        html.write(output, report, plots)
    return Outcome(output, report, [], clock.total)


def _seen(manifest: dict[str, Any], loaded: LoadedModel, config: EvalConfig) -> Seen | None:
    """The text that a checkpoint was calibrated on, read again where that is cheap and gives the same tokens."""
    if not manifest.get("data") or not set(config.tasks) & set(evaluation.OWN_TASKS):
        return None
    recorded = DataConfig.model_validate(manifest["recipe"]["data"])
    if not sources.is_local(recorded):
        return Seen(recorded.source, None)
    try:
        text = windows.calibration(recorded, loaded, manifest["seed"])
        if windows.token_hash(*text) != manifest["data"]["sha256"]:
            raise InputError(f"{recorded.source} has changed since")
    except InputError as error:
        progress.note(f"the overlap with the calibration text is not measured: {error}")
        return Seen(recorded.source, None)
    return Seen(recorded.source, text.tokens)


def _reference(path: str | None, model: ModelConfig, *, required: bool) -> LoadedModel | None:
    """The float model, or ``None`` and a note when a manifest names one that is not there any more."""
    if path is None:
        return None
    try:
        return load_model(model.model_copy(update={"path": path}))
    except InputError as error:
        if required:
            raise
        progress.note(f"the float model is not measured: {error}")
        return None
