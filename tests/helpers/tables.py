"""Tiny models with packed embeddings and heads, quantized in memory and written as native checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.methods import QUICK
from qtool.blocks.job import Job, Method, Result, load_method
from qtool.blocks.tables import pack_embeddings
from qtool.checkpoints import native, output_folder
from qtool.config.quant import QuantConfig
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear

EMBEDDING: dict[str, Any] = {"num_bits": 8}


def config(**keys: Any) -> QuantConfig:
    """Return a section ``quant`` of 4 bits with a packed embedding of 8 bits; ``keys`` change it."""
    return QuantConfig.model_validate({"num_bits": 4, "group_size": 16, "embedding": EMBEDDING} | keys)


def run(
    name: str, loaded: LoadedModel, quant: QuantConfig, tokens: Tensor | None = None, **settings: Any
) -> tuple[Job, Result]:
    """Quantize ``loaded`` as a run does, by the method ``name``; return the job and the method's result."""
    method: Method[Any] = load_method(name)
    made = method.config(**QUICK.get(name, {}) | settings)
    job = pack_embeddings(Job.select(loaded, quant, tokens if method.needs_data(made) else None))
    return job, method.run(job, made)


def written(job: Job, out: Path) -> Path:
    """Write the native checkpoint of a job that was run, without manifest and model card."""
    specs = {target.name: target.spec for target in job.targets} | job.tables.specs
    with output_folder.atomic_folder(out, overwrite=False) as partial:
        native.save(partial, job.loaded, specs, job.tables)
    return out


def packed(model: nn.Module) -> dict[str, PackedEmbedding]:
    """Return the packed embeddings of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}


def tied(model: nn.Module) -> dict[str, TiedLinear]:
    """Return the heads of a model that read the table of a packed embedding."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TiedLinear)}


def expanded(model: nn.Module, job: Job) -> None:
    """Put the float modules of a job back into ``model``, with the weights that the packed ones stand for."""
    for name, table in packed(model).items():
        module = job.tables.floats[name]
        assert isinstance(module, nn.Embedding)
        module.weight = nn.Parameter(table.dequantized(module.weight.dtype), requires_grad=False)
        model.set_submodule(name, module)
        for head, table_name in job.tables.tied.items():
            if table_name == name:
                linear = job.tables.floats[head]
                linear.register_parameter("weight", module.weight)
                model.set_submodule(head, linear)


def without_floats(job: Job) -> Job:
    """Return the job without the float modules, as if the process had begun after the embeddings were packed."""
    return replace(job, tables=replace(job.tables, floats={}, errors={}))


def random_ids(*shape: int, rows: int, seed: int = 0) -> Tensor:
    """Return random row numbers below ``rows``."""
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))
