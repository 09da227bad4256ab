"""The pipeline: recipe -> model -> tokens -> method -> checkpoint -> evaluation -> exports.

Everything that can be refused is refused before the model is quantized. The checkpoint gets its name when it is whole;
evaluation and exports come after, and a failure there loses nothing of it.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from qtool import card, checkpoint, data, methods, progress
from qtool import evaluate as evaluation
from qtool import export as formats
from qtool.checkpoint import MANIFEST, Planned, Source, atomic_folder, write_json
from qtool.config import FORMAT_VERSION, EvalConfig, ExportConfig, ModelConfig
from qtool.errors import InputError
from qtool.layout import label as _label
from qtool.models import LoadedModel, load_model, packed_linears, resolve
from qtool.recipe import Recipe, resolved
from qtool.report import Report, environment
from qtool.verify import load_exported, verify


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


def quantize(recipe: Recipe, command: str) -> Outcome:
    """Run a recipe whose method belongs to ``command``.

    Raises:
        InputError: anything in the recipe, the model or the data that cannot be used; nothing was written.
        RunError: the run could not be finished.
    """
    transformers.logging.disable_progress_bar()
    clock = _Clock()
    method = methods.get(recipe.method.name)
    assert method.command == command
    _check_early(recipe)
    folder = resolve(recipe.model.path)
    with atomic_folder(recipe.output.path, overwrite=recipe.output.overwrite, source=folder) as partial:
        with clock.phase("load", f"loading {recipe.model.path}"):
            loaded = load_model(recipe.model)
            targets = loaded.targets(recipe.quant)
        specs = {target.name: target.spec for target in targets}
        shapes = {target.name: (target.weight.shape[0], target.weight.shape[1]) for target in targets}
        bits = checkpoint.bits_per_weight(specs, shapes)
        float_bytes = sum(p.numel() for p in loaded.model.parameters()) * loaded.storage_dtype.itemsize
        checkpoint.check_space(recipe.output.path, float_bytes)  # never more than the float model
        _check_exports(recipe, Planned(loaded, specs, shapes))
        tokens = None
        if method.needs_data(recipe.method):
            with clock.phase("data", f"reading calibration text: {recipe.data.source}"):
                tokens = data.calibration_tokens(recipe.data, loaded, recipe.seed)
        with clock.phase("quantize", f"{recipe.method.name}, {_label(specs)}"):
            series = method.run(loaded, tokens, recipe.quant, recipe.method, recipe.seed)
        assert set(packed_linears(loaded.model)) == set(specs), "the method did not quantize exactly its targets"
        with clock.phase("save", f"writing {recipe.output.path}"):
            checkpoint.save(partial, loaded)
            report = Report(
                model=recipe.model.path,
                quantized=str(recipe.output.path),
                label=_label(specs),
                method=recipe.method.name,
                bits_per_weight=bits,
                float_bytes=float_bytes,
                quantized_bytes=checkpoint.folder_bytes(partial),
                dtype=_name(loaded.dtype),
                device=str(loaded.device),
                seed=recipe.seed,
            )
            write_json(partial / MANIFEST, _manifest(recipe, report, tokens, series, clock.seconds))
            card.write(partial, report)
    if recipe.eval is not None:
        progress.note(f"{recipe.output.path} is complete; what follows reads it")
        with clock.phase("eval", "evaluating"):
            reference = load_model(recipe.model)
            results = evaluation.evaluate(loaded, recipe.eval, reference, recipe.seed)
            found = {"results": tuple(results), "seconds": clock.seconds, "backend": recipe.eval.backend}
            report = report.model_copy(update=found)
            del reference
        report.write(recipe.output.path)
        card.write(recipe.output.path, report)
    exports = []
    for entry in recipe.export:
        with clock.phase(f"export {entry.format}", f"exporting {entry.format}"):
            exports.append(export(recipe.output.path, entry, recipe.output.overwrite))
    report = report.model_copy(update={"seconds": clock.seconds})
    report.write(recipe.output.path)
    card.write(recipe.output.path, report)
    return Outcome(recipe.output.path, report, exports, clock.total)


def evaluate(
    target: str, config: EvalConfig, model: ModelConfig, float_model: str | None, output: Path | None, seed: int
) -> Outcome:
    """Measure a native, exported or plain model; beside it its float model, where that is known and there.

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
        results = evaluation.evaluate(loaded, config, reference, seed)
    described: dict[str, Any] = {}
    if source is not None:
        shapes = {name: tuple(source.tensor(f"{name}.weight_shape").tolist()) for name in source.specs}
        described = {
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
        dtype=_name(loaded.dtype),
        device=str(loaded.device),
        backend=config.backend if packed_linears(loaded.model) else None,
        seed=seed,
        **described,
    )
    if output is not None:
        report.write(output)
    return Outcome(output, report, [], clock.total)


def export(folder: Path, config: ExportConfig, overwrite: bool) -> Path:
    """Write one export of a native checkpoint, read back and compared before it gets its name.

    Raises:
        InputError: not a native checkpoint, or one that the format cannot hold exactly.
        RunError: what was read back differs.
    """
    source = Source(folder)
    exporter = formats.get(config.format)
    _refuse(exporter.refuses(source, config), config, str(folder))
    with atomic_folder(config.path, overwrite=overwrite, source=folder) as partial:
        notes = exporter.write(source, partial, config)
        differences = verify(source, partial, exporter, rounded=config.dtype != "auto" and config.format == "dense")
        card.write_export(partial, source, config, notes, differences)
    for note in notes:
        progress.note(f"{config.format}: {note}")
    return config.path


def _check_early(recipe: Recipe) -> None:
    """What can be refused without the model."""
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
        _refuse(formats.get(entry.format).refuses(planned, entry), entry, recipe.model.path)


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
    tokens: torch.Tensor | None,
    series: dict[str, list[float]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "recipe": resolved(recipe),
        "seed": recipe.seed,
        "data": None if tokens is None else {"tokens": list(tokens.shape), "sha256": data.token_hash(tokens)},
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
