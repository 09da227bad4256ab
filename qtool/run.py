"""The pipeline: recipe -> model -> tokens -> method -> checkpoint -> evaluation -> exports.

Everything that can be refused is refused before the model is quantized. The checkpoint gets its name when it is whole;
evaluation and exports come after, and a failure there loses nothing of it.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from qtool import card, checkpoint, data, methods, progress, ranks
from qtool import evaluate as evaluation
from qtool import export as formats
from qtool.checkpoint import MANIFEST, Planned, Source, atomic_folder, write_json
from qtool.config import FORMAT_VERSION, IMMATERIAL, DataConfig, EvalConfig, ExpectedConfig, ExportConfig, ModelConfig
from qtool.data import Calibration
from qtool.errors import InputError
from qtool.folders import check_files, resolve
from qtool.layout import label as _label
from qtool.models import LoadedModel, choose_device, load_model, packed_linears
from qtool.overlap import Seen
from qtool.recipe import Recipe, resolved
from qtool.report import CalibrationText, Report, compare, environment, processor
from qtool.state import RunState, run_state
from qtool.verify import load_exported, verify

LOCKED_FILES = ("*.safetensors", "config.json", "tokenizer*", "*.model", "vocab*", "merges*")
LOCKED_PACKAGES = ("qtool", "torch", "transformers", "tokenizers")


@dataclass
class Outcome:
    """What a command made: the folder of its result, the report, the exports, and how long it took."""

    path: Path | None
    report: Report
    exports: list[Path]
    seconds: float


@dataclass
class _Clock:
    """Wall time by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        start = time.perf_counter()
        with progress.stage(title):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def quantize(recipe: Recipe, command: str, fresh: bool = False) -> Outcome | None:
    """Run a recipe whose method belongs to ``command``, or go on where an earlier start of it was stopped.

    ``fresh`` forgets an unfinished run. Of several processes the first one writes and evaluates; others get ``None``.

    Raises:
        InputError: anything in the recipe, the model or the data that cannot be used; nothing was written.
        RunError: the run could not be finished.
    """
    transformers.logging.disable_progress_bar()
    clock = _Clock()
    method = methods.get(recipe.method.name)
    assert method.command == command
    check_early(recipe)
    folder = resolve(recipe.model.path)
    ranks.begin(choose_device(recipe.model.device))
    lock = lock_of(recipe, folder)
    output, end_to_end = recipe.output, method.end_to_end(recipe.method)
    options: dict[str, Any] = {"overwrite": output.overwrite, "fresh": fresh, "source": folder}
    with run_state(output.path, lock, end_to_end=end_to_end, **options) as state:
        with clock.phase("load", f"loading {recipe.model.path}"):
            loaded = load_model(recipe.model, finished=state, budget=recipe.data.memory_budget)
            state.loaded = loaded
            targets = loaded.targets(recipe.quant)
        specs = {target.name: target.spec for target in targets}
        shapes = {target.name: target.weight_shape for target in targets}
        bits = checkpoint.bits_per_weight(specs, shapes)
        float_bytes = sum(p.numel() for p in loaded.model.parameters()) * loaded.storage_dtype.itemsize
        checkpoint.check_space(output.path, float_bytes)  # never more than the float model
        _check_exports(recipe, Planned(loaded, specs, shapes))
        text = None
        if method.needs_data(recipe.method):
            with clock.phase("data", f"reading calibration text: {recipe.data.source}"):
                text = _calibration(recipe, loaded, state)
        tokens, labels = text or (None, None)
        masked = {"labels": labels} if method.takes_labels and labels is not None else {}
        with clock.phase("quantize", f"{recipe.method.name}, {_label(specs)}"):
            series = method.run(loaded, tokens, recipe.quant, recipe.method, recipe.seed, **masked)
        ranks.end()
        if not ranks.is_first():
            return None
        assert set(packed_linears(loaded.model)) <= set(specs), "the method quantized more than its targets"
        with clock.phase("save", f"writing {output.path}"):
            if end_to_end:  # all is in memory; what is there is of a run that was killed while it wrote this
                checkpoint.clear(state.model)
            checkpoint.save(state.model, loaded, specs)
            report = Report(
                model=recipe.model.path,
                quantized=str(output.path),
                label=_label(specs),
                method=recipe.method.name,
                bits_per_weight=bits,
                float_bytes=float_bytes,
                quantized_bytes=checkpoint.folder_bytes(state.model),
                dtype=_name(loaded.dtype),
                device=str(loaded.device),
                seed=recipe.seed,
                calibration=None if tokens is None else _described(recipe.data),
                expected=compare(recipe.expected, ()),
            )
            manifest = _manifest(recipe, report, text, series, clock.seconds)
            files = checkpoint.file_hashes(state.model, "*.safetensors")
            write_json(state.model / MANIFEST, manifest | {"command": command, "lock": lock, "files": files})
            card.write(state.model, report)
        del loaded
    if recipe.eval is not None:
        progress.note(f"{output.path} is complete; what follows reads it")
        with clock.phase("eval", "evaluating"):
            written = load_model(recipe.model.model_copy(update={"path": str(output.path)}), quantized=True)
            reference = load_model(recipe.model)
            seen = None if tokens is None else Seen(recipe.data.source, tokens)
            results = evaluation.evaluate(written, recipe.eval, reference, recipe.seed, seen)
            found = {"results": tuple(results), "seconds": clock.seconds, "backend": recipe.eval.backend}
            report = report.model_copy(update=found | {"expected": compare(recipe.expected, results)})
            del written, reference
        report.write(output.path)
        card.write(output.path, report)
    exports = []
    for entry in recipe.export:
        with clock.phase(f"export {entry.format}", f"exporting {entry.format}"):
            exports.append(export(output.path, entry, output.overwrite))
    report = report.model_copy(update={"seconds": clock.seconds})
    report.write(output.path)
    card.write(output.path, report)
    return Outcome(output.path, report, exports, clock.total)


def lock_of(recipe: Recipe, folder: Path, model_files: dict[str, str] | None = None) -> dict[str, Any]:
    """What the bytes of the result depend on; ``model_files`` are the hashes of ``folder`` where they are known."""
    if model_files is None:
        check_files(folder)
    recipe_keys = _without(resolved(recipe), IMMATERIAL)
    return {
        **{section: recipe_keys[section] for section in ("model", "method", "quant", "data", "seed")},
        "model_files": checkpoint.file_hashes(folder, *LOCKED_FILES) if model_files is None else model_files,
        "versions": {name: version for name, version in environment().items() if name in LOCKED_PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),
    }


def _without(keys: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``keys`` without those called so, in sections inside it too."""
    return {k: _without(v, names) if isinstance(v, dict) else v for k, v in keys.items() if k not in names}


def _calibration(recipe: Recipe, loaded: LoadedModel, state: RunState) -> Calibration:
    """The calibration windows, made by the first process and read by all."""
    if ranks.is_first():
        if recipe.data.source != "generated":
            state.keep_tokens(*data.calibration(recipe.data, loaded, recipe.seed))
        elif state.calibration() is None:
            # to write text a model must be whole
            state.keep_tokens(*data.calibration(recipe.data, load_model(recipe.model), recipe.seed))
    ranks.wait()
    text = state.calibration()
    assert text is not None
    return text


def _described(config: DataConfig) -> CalibrationText:
    return CalibrationText(source=config.source, num_samples=config.num_samples, seq_len=config.seq_len)


def evaluate(
    target: str,
    config: EvalConfig,
    model: ModelConfig,
    float_model: str | None,
    output: Path | None,
    seed: int,
    expected: Sequence[ExpectedConfig] = (),
) -> Outcome:
    """Measure a native, exported or plain model; beside it its float model, where that is known and there.

    Published numbers are those ``expected``, or else those that the recipe of a native checkpoint names.

    Raises:
        InputError: a task, model or output folder that cannot be used.
    """
    transformers.logging.disable_progress_bar()
    clock = _Clock()
    evaluation.check_tasks(config)
    folder = resolve(target)
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
    described: dict[str, Any] = {}
    if manifest:
        recorded = manifest["recipe"]
        expected = expected or [ExpectedConfig.model_validate(each) for each in recorded.get("expected", ())]
        described["calibration"] = _described(DataConfig.model_validate(recorded["data"])) if manifest["data"] else None
    if source is not None:
        shapes = {name: tuple(source.tensor(f"{name}.weight_shape").tolist()) for name in source.specs}
        described |= {
            "quantized": target,
            "label": _label(source.specs),
            "method": manifest["recipe"]["method"]["name"],
            "bits_per_weight": checkpoint.bits_per_weight(source.specs, shapes),
            "quantized_bytes": source.num_bytes(),
        }
    elif origin is not None:
        described = {"quantized": target, "quantized_bytes": checkpoint.folder_bytes(folder)}
    report = Report(
        model=origin or target,
        float_bytes=checkpoint.folder_bytes(reference.folder) if reference else None,
        seconds=clock.seconds,
        results=tuple(results),
        expected=compare(expected, results),
        dtype=_name(loaded.dtype),
        device=str(loaded.device),
        backend=config.backend if packed_linears(loaded.model) else None,
        seed=seed,
        **described,
    )
    if output is not None:
        report.write(output)
    return Outcome(output, report, [], clock.total)


def _seen(manifest: dict[str, Any], loaded: LoadedModel, config: EvalConfig) -> Seen | None:
    """The text that a checkpoint was calibrated on, read again where that is cheap and gives the same tokens."""
    if not manifest.get("data") or not set(config.tasks) & set(evaluation.OWN_TASKS):
        return None
    recorded = DataConfig.model_validate(manifest["recipe"]["data"])
    if not data.is_local(recorded):
        return Seen(recorded.source, None)
    try:
        text = data.calibration(recorded, loaded, manifest["seed"])
        if data.token_hash(*text) != manifest["data"]["sha256"]:
            raise InputError(f"{recorded.source} has changed since")
    except InputError as error:
        progress.note(f"the overlap with the calibration text is not measured: {error}")
        return Seen(recorded.source, None)
    return Seen(recorded.source, text.tokens)


def export(folder: Path, config: ExportConfig, overwrite: bool) -> Path:
    """Write one export of a native checkpoint, read back and compared before it gets its name.

    Raises:
        InputError: not a native checkpoint, or one that the format cannot hold exactly.
        RunError: what was read back differs.
    """
    source = Source(folder)
    exporter = formats.get(config.format)
    _refuse(formats.refusal(config.format, source, config), config, str(folder))
    with atomic_folder(config.path, overwrite=overwrite, source=folder) as partial:
        notes = exporter.write(source, partial, config)
        differences = verify(source, partial, exporter, rounded=config.dtype != "auto" and config.format == "dense")
        card.write_export(partial, source, config, notes, differences)
    for note in notes:
        progress.note(f"{config.format}: {note}")
    return config.path


def check_early(recipe: Recipe) -> None:
    """Refuse what can be refused without the model.

    Raises:
        InputError: processes, data, tasks or folders that cannot be used.
    """
    if ranks.count() > 1 and not methods.get(recipe.method.name).end_to_end(recipe.method):
        raise InputError(f"method {recipe.method.name} runs in one process, and there are {ranks.count()}")
    if methods.get(recipe.method.name).needs_data(recipe.method):
        data.check_source(recipe.data)
    if recipe.eval is not None:
        evaluation.check_tasks(recipe.eval)
    paths = [recipe.output.path, *(entry.path for entry in recipe.export)]
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise InputError(f"{path} is named {count} times as an output folder; give each its own")
    for entry in recipe.export:
        checkpoint.check_folder(entry.path, overwrite=recipe.output.overwrite, source=recipe.output.path)


def _check_exports(recipe: Recipe, planned: Source) -> None:
    for entry in recipe.export:
        _refuse(formats.refusal(entry.format, planned, entry), entry, recipe.model.path)


def _refuse(reason: str | None, config: ExportConfig, what: str) -> None:
    if reason is not None:
        raise InputError(f"{what} cannot be exported as {config.format}: {reason}")


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


def _manifest(
    recipe: Recipe,
    report: Report,
    text: Calibration | None,
    series: dict[str, list[float]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "recipe": resolved(recipe),
        "seed": recipe.seed,
        "data": None if text is None else {"tokens": list(text.tokens.shape), "sha256": data.token_hash(*text)},
        "label": report.label,
        "bits_per_weight": report.bits_per_weight,
        "float_bytes": report.float_bytes,
        "quantized_bytes": report.quantized_bytes,
        "series": series,
        "seconds": seconds,
        "versions": environment(),
        "date": report.date,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
