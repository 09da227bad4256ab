"""``model.free: true``: a run that needs no class of the model, only its files. It replaces the steps up to the report.

The files are read twice, tensor by tensor: for values that cannot be used, and to quantize. Each file of the model
becomes one file of the checkpoint, so a run that was stopped goes on with the next file.
"""

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.blocks.job import Method, load_method
from qtool.checkpoints import files, free, output_folder, sizes
from qtool.checkpoints.files import shard_name, write_durably, write_index
from qtool.checkpoints.free import WEIGHT, PlannedFiles
from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.quantization_config import grids_label
from qtool.config import catalog
from qtool.config.quant import ACTIVATION_KEYS, QuantSpec
from qtool.config.recipe import Recipe
from qtool.evaluation import weights
from qtool.exporters import _base
from qtool.exporters._folder import stored_dtype
from qtool.models import by_name, quantized_sources
from qtool.models.by_name import Chosen
from qtool.models.folders import check_files, read_config, resolve
from qtool.models.gguf_view import source_of
from qtool.models.loaded import most_common
from qtool.models.loading import check_adapter, choose_device, compute_dtype
from qtool.models.quantized_sources import FloatTensors
from qtool.models.targets import shortened
from qtool.pipelines.checks import check_exports
from qtool.pipelines.clock import PhaseTimer
from qtool.pipelines.run_state import BlockRecord, RunState
from qtool.quant.affine import QuantizedWeight, check_weight, relative_error
from qtool.reports.records import beside_published
from qtool.reports.report import Report
from qtool.system import progress
from qtool.system.errors import InputError, listing
from qtool.system.tensors import dtype_name


@dataclass(frozen=True)
class Free:
    """The tensors of a model, what is quantized of them, and where and in what precision that is computed."""

    source: FloatTensors
    chosen: Chosen
    storage: torch.dtype  # dtype of most tensors
    dtype: torch.dtype
    device: torch.device


def check(recipe: Recipe) -> None:
    """Refuse what a run without the model's class cannot do.

    Raises:
        InputError: the method, an evaluation, a budget, grids of embedding and head, or rounding of activations.
    """
    if load_method(recipe.method.name).round_weight is None:
        names = [name for name in catalog.methods() if load_method(name).round_weight is not None]
        raise InputError(
            f"model.free: method {recipe.method.name} runs the model, which needs its class; use {' or '.join(names)}"
        )
    if recipe.eval is not None:
        raise InputError("model.free: an evaluation runs the model, which needs its class; leave the section eval out")
    if recipe.quant.budget is not None:
        raise InputError("model.free: quant.budget measures the model, which needs its class; use quant.overrides")
    if not isinstance(recipe.quant.embedding, str):
        raise InputError(
            "model.free: quant.embedding needs the model's class, which says how the embedding is read; leave it out"
        )
    if not isinstance(recipe.quant.head, str):
        raise InputError(
            "model.free: quant.head needs the model's class, which says what the head is; leave it out, and let "
            "quant.overrides quantize a head by its name: {lm_head: {skip: false, num_bits: 8, group_size: -1}}"
        )
    grids: dict[str, QuantSpec] = {"quant": recipe.quant}
    grids |= {f"quant.overrides '{pattern}'": override for pattern, override in recipe.quant.overrides.items()}
    for where, grid in grids.items():
        if key := next((key for key in ACTIVATION_KEYS if getattr(grid, key) is not None), None):
            raise InputError(f"model.free: {where} has {key}, which needs the model's class; leave it out")


def run(recipe: Recipe, method: Method[Any], state: RunState, timer: PhaseTimer) -> tuple[Report, dict[str, float]]:
    """Write the checkpoint without its manifest; return its report, and the relative error of each weight."""
    with timer.phase("load", f"reading {recipe.model.path}"):
        model = _open(recipe)
        _check_values_and_exports(recipe, state, model)
    with timer.phase("quantize", f"quantizing with {recipe.method.name}, {grids_label(model.chosen.specs)}"):
        errors = _write_files(recipe, method, state, model)
    with timer.phase("save", f"writing {recipe.output.path}"):
        write_index(state.model)
        _describe(state.model, model)
    chosen, source = model.chosen, NativeCheckpoint(state.model)
    report = Report(
        model=recipe.model.path,
        quantized=str(recipe.output.path),
        label=grids_label(chosen.specs),
        method=recipe.method.name,
        bits_per_weight=sizes.linear_bits(source),
        file_bits_per_weight=sizes.file_bits(source),
        float_bytes=_float_bytes(model.source),
        quantized_bytes=source.num_bytes(),
        dtype=dtype_name(model.dtype),
        device=str(model.device),
        seed=recipe.seed,
        expected=beside_published(recipe.expected, ()),
        linears=weights.linear_records({**chosen.shapes, **chosen.floats}, source, errors),
        tables=weights.named_tables(by_name.float_tables(model.source.described, chosen), source),
        lock=state.lock,
        **timer.measured(),
    )
    return report, errors


def _open(recipe: Recipe) -> Free:
    """Open the files of the model, and choose what is quantized."""
    folder, path = resolve(recipe.model.path), recipe.model.path
    check_adapter(path, folder)
    raw = read_config(folder)
    if source_of(folder) != folder:
        raise InputError(f"model.free reads safetensors, and {path} is a GGUF file; leave model.free out of the recipe")
    quantized_sources.refuse_quantized(path, raw)
    check_files(folder)
    quantized_sources.refuse_codes(path, folder, raw)
    source = FloatTensors(folder)
    chosen = by_name.choose(source.described, recipe.quant, raw)
    if chosen.faults:
        raise InputError(listing(f"{path} cannot be quantized with this recipe:", shortened(chosen.faults)))
    if source.quantized:
        progress.note(f"{path}: {source.note()}")
    progress.note(chosen.note())
    if "auto_map" in raw:
        progress.note(f"{path}: auto_map in config.json is left out: it names code of this folder, which is not copied")
    device = choose_device(recipe.model.device)
    storage = most_common({name: d.dtype for name, d in source.described.items() if d.dtype.is_floating_point})
    return Free(source, chosen, storage, compute_dtype(recipe.model.dtype, storage, device), device)


def _check_values(model: Free) -> tuple[dict[str, float], list[str]]:
    """Return the largest absolute value of each floating-point tensor, and all faults of the values."""
    largest: dict[str, float] = {}
    faults: list[str] = []

    def look(name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        low, high = (float(end) for end in tensor.aminmax())
        largest[name] = max(-low, high)
        linear = name.removesuffix(WEIGHT)
        try:
            if linear in model.chosen.specs:
                matrix = next(model.chosen.layouts[linear].matrices(tensor))
                check_weight(matrix, model.chosen.specs[linear], name, (low, high))
            elif not math.isfinite(low) or not math.isfinite(high):
                count = int((~tensor.isfinite()).sum())
                raise InputError(f"{name} holds {count} NaN or infinite value(s); repair the checkpoint")
            if largest[name] > (limit := torch.finfo(model.dtype).max) and tensor.dtype == model.storage:
                raise InputError(
                    f"{name} has values of up to {largest[name]:.6g}, and {dtype_name(model.dtype)}, in which it would "
                    f"be quantized, holds none above {limit:g}; set model.dtype to bfloat16 or float32"
                )
        except InputError as error:
            faults.append(str(error))

    names = model.source.described
    for name in progress.track(names, "checking the values of tensors", len(names)):
        model.source.visit(name, partial(look, name))
    return largest, faults


def _check_values_and_exports(recipe: Recipe, state: RunState, model: Free) -> None:
    """Check all values, the space on disk, the files beside the weights, and the exports.

    Raises:
        InputError: with all faults of the values: not finite, a group size that does not divide, a scale that its dtype
            does not hold; or an export or a file cannot be written.
    """
    source, chosen = model.source, model.chosen
    largest, faults = _check_values(model)
    if faults:
        raise InputError(listing(f"{recipe.model.path} cannot be quantized with this recipe:", shortened(faults)))
    output_folder.check_space(recipe.output.path, _float_bytes(source))
    trial = state.folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    try:
        _describe(trial, model)
        planned = PlannedFiles(trial, source, chosen.specs, chosen.shapes, largest)
        check_exports(recipe, planned)
        for index, entry in enumerate(recipe.export):
            (out := trial / f"export {index}").mkdir()
            dtype = stored_dtype(planned) if entry.dtype == "auto" else entry.dtype
            _base.get(entry.format).describe(planned, out, dtype)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _describe(folder: Path, model: Free) -> None:
    """Write what the checkpoint has beside its weights into ``folder``."""
    experts = {name: layout.experts for name, layout in model.chosen.layouts.items() if layout.experts > 1}
    free.describe(folder, model.source, model.chosen.specs, experts, dtype_name(model.storage))


def _float_bytes(source: FloatTensors) -> int:
    return sum(each.num_bytes for each in source.described.values())


def _write_files(recipe: Recipe, method: Method[Any], state: RunState, model: Free) -> dict[str, float]:
    """Write a file of the checkpoint for each file of the model; return the relative error of each weight."""
    errors: dict[str, float] = {}
    source, specs = model.source, model.chosen.specs
    assert method.round_weight is not None
    round_weight = method.round_weight

    def quantize(name: str, tensor: Tensor) -> QuantizedWeight:
        dtype = model.dtype if tensor.dtype == model.storage else tensor.dtype
        found, changes = [], []
        for matrix in model.chosen.layouts[name].matrices(tensor):
            weight = matrix.to(model.device, dtype).contiguous()
            found.append(round_weight(weight.float(), specs[name], recipe.method))
            changes.append((relative_error(weight, found[-1]), float(weight.float().square().sum())))
        total = sum(norm for _, norm in changes)
        errors[name] = sum(error * norm for error, norm in changes) / total if total else changes[0][0]
        codes, scale, zero_point, spec = zip(*found, strict=True)
        return QuantizedWeight(torch.cat(codes), torch.cat(scale), torch.cat(zero_point), spec[0])

    for index, names in enumerate(progress.track(source.files.values(), "quantizing the files", len(source.files))):
        file = state.model / shard_name(index, len(source.files) - 1)
        record = state.record(index)
        if record is not None and files.file_hashes(state.model, file.name) == {file.name: record.sha256}:
            errors |= record.weight_errors
            continue
        before = set(errors)
        free.write_file(file, source, names, specs, model.chosen.shapes, quantize)
        made = {name: error for name, error in errors.items() if name not in before}
        sha256 = files.file_hashes(state.model, file.name)[file.name]
        kept = BlockRecord(sha256=sha256, figures={}, weight_errors=made)
        write_durably(state.record_file(index), kept.model_dump(mode="json"))
    return errors
