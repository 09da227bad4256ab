"""Trainings that ``test_sharding`` runs in one process, and as ``sharded_training.py FOLDER DEVICE`` in two.

The two split the model, and each of them writes what it saw to ``FOLDER/<case>-<process>.pt``.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helpers import tiny
from helpers.methods import by_name
from qtool.blocks.job import Job, load_method
from qtool.blocks.tables import pack_embeddings
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.methods.efficientqat import e2e_qp
from qtool.methods.efficientqat.e2e_qp import ScaleLinear
from qtool.models.linears import packed_weights
from qtool.models.loading import load_model
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system import distributed
from qtool.training import end_to_end, linears, sharding
from qtool.training.fit import fit as fit_groups

W2 = QuantConfig(num_bits=2, group_size=16, symmetric=False, scale_dtype="float32")
LEVELS = QuantConfig(num_bits=2, group_size=-1, symmetric=False, float_zero=True, scale_dtype="float32")
TABLES = QuantConfig.model_validate(W2.model_dump(exclude={"overrides", "budget"}) | {"embedding": {"num_bits": 4}})
STEPS = 4
COMMON: dict[str, Any] = {"batch_size": 5, "steps": STEPS, "min_steps": 0, "save_every": 2}
# Adam divides by the size of a gradient and so makes much of rounding errors; with an eps as large as these it does not
STEADY = {"eps": 1.0}
CLIPPED = {"eps": 0.01, "max_grad_norm": 0.01, "accumulation": 3}
WATCHED = {"validation_samples": 1, "validate_every": 1, "gradient_checkpointing": True}
WEIGHTS = {"lr": 1.0}
GRID = {"lr": 1.0, "scale_lr": 0.1}
LSQ = GRID | {"init": "minmax"}
LOW_RANK = GRID | {"rank": 3, "range": "minmax"}


@dataclass(frozen=True)
class Case:
    """A training on a tiny model."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=lambda: STEADY)
    quant: QuantConfig = W2
    family: str = "llama"
    dtype: str = "float32"


CASES = {
    "plain": Case("lsq", LSQ),
    "watched": Case("lsq", LSQ | WATCHED, CLIPPED),
    "worse": Case("lsq", {"init": "minmax", "validation_samples": 2, "validate_every": 1, "travel": 40.0}),
    "short": Case("lsq", LSQ | {"min_steps": 40}),
    "signs": Case("lsq", {"init": "minmax"}, {"optimizer": "signsgd"}),
    "weights": Case("qat", WEIGHTS | {"loss": "cakld"}, family="gpt2"),
    "alone": Case("llmqat", WEIGHTS | {"loss": "ce"}),
    "levels": Case("paretoq", GRID | {"loss": "ce"}, quant=LEVELS),
    "factors": Case("lrqat", LOW_RANK | {"gradient_checkpointing": True}),
    "codes": Case("lrqat", LOW_RANK | {"phi": "codes", "checkpoint_weights": False, "factors": "svd"}),
    "scales": Case("efficientqat", WATCHED | {"lr": 0.1}),
    "half": Case("lsq", LSQ | {"loss": "mixed"}, dtype="bfloat16"),
    "table": Case("lsq", LSQ, quant=TABLES),
    "places": Case("qat", WEIGHTS | {"loss": "cakld"}, quant=TABLES, family="gpt2"),
    "head": Case("lsq", LSQ | WATCHED, quant=TABLES, family="untied"),
    "head factors": Case("lrqat", LOW_RANK, quant=TABLES, family="untied"),
    "head scales": Case("efficientqat", WATCHED | {"lr": 0.1}, quant=TABLES, family="untied"),
    "still": Case("lsq", {"init": "minmax", "steps": 0}),
    "head still": Case("lsq", {"init": "minmax", "steps": 0}, quant=TABLES, family="untied"),
}
KILLED = {"killed": "plain", "killed head": "head factors"}  # cases stopped after their third step and begun again


def tokens() -> Tensor:
    return torch.randint(2, tiny.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


def models(folder: Path) -> None:
    """Write the float models of all cases: tied embeddings and biases, an untied head, and transposed linears."""
    tiny.llama(folder / "llama", dtype=torch.float32, tied=True, bias=True)
    tiny.llama(folder / "untied", dtype=torch.float32)
    tiny.gpt2(folder / "gpt2")


def live_bytes() -> int:
    """Return the bytes of all plain tensors that anything refers to."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    return sum(storages.values())


def held(model: nn.Module) -> dict[str, Any]:
    """Return the size of each matrix of ``model``, and how many of its numbers this process holds."""
    parameters = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    here = {name: distributed.local_shard(p).numel() for name, p in parameters.items()}
    whole = [name for name, buffer in model.named_buffers() if buffer.dim() >= 2 and buffer.dtype != torch.bool]
    whole += [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    return {"all": {name: p.numel() for name, p in parameters.items()}, "here": here, "whole": whole}


@contextmanager
def recorded(found: dict[str, Any]) -> Iterator[pytest.MonkeyPatch]:
    """Record the memory of a training when it begins, its logits when it ends, and the layers that are packed."""
    run, gather = sharding.train_by_block, sharding._Shards.gather
    before = live_bytes()

    def fit(groups: Any, *args: Any, **kwargs: Any) -> Any:
        found["live"] = live_bytes() - before
        found["moved"] = [(p.numel(), distributed.local_shard(p).numel()) for group in groups for p in group.parameters]
        return fit_groups(groups, *args, **kwargs)

    def by_block(job: Job, teacher: nn.Module | None, config: Any, make: Any, train: Any, pack: Any) -> Any:
        def watched(groups: Any) -> Any:
            found["student"] = held(job.loaded.model)
            found["teacher"] = None if teacher is None else held(teacher)
            return train(groups)

        return run(job, teacher, config, make, watched, pack)

    def gathered(shards: Any, pack: Any) -> None:
        found["last"] = tiny.logits(shards.student)
        gather(shards, pack)
        found["packed"] = tiny.logits(shards.loaded.model)

    def kept(layer: nn.Module) -> None:
        masters = {name: p.detach().float().clone() for name, p in layer.named_parameters() if p.numel()}
        names = ("a", "b", "weight", "scale", "zero_point", "bias")
        found["masters"].append({name: p for name, p in masters.items() if name in names})

    def frozen(layer: QuantLinear) -> PackedLinear:
        kept(layer)
        return freeze(layer)

    def packed_scales(layer: ScaleLinear) -> PackedLinear:
        kept(layer)
        return packed(layer)

    found["masters"] = []
    freeze, packed = QuantLinear.freeze, ScaleLinear.packed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "fit", fit)
        for module in (linears, e2e_qp):
            patch.setattr(module, "train_by_block", by_block)
        patch.setattr(sharding._Shards, "gather", gathered)
        patch.setattr(QuantLinear, "freeze", frozen)
        patch.setattr(ScaleLinear, "packed", packed_scales)
        yield patch


def train_case(case: Case, folder: Path, state: Path, split: str, device: str) -> dict[str, Any]:
    """Train, and return what was recorded, the quantized weights and all other parameters."""
    found: dict[str, Any] = {}
    with recorded(found):
        config = ModelConfig(path=str(folder / case.family), dtype=case.dtype, device=device)
        state.mkdir(exist_ok=True)
        loaded = load_model(config, streamed=True)
        settings = COMMON | case.settings | {"sharding": split, "optim": case.optim}
        if case.method == "efficientqat":
            settings = {"epochs": 0, "e2e": settings}  # Adam's first steps make much of rounding errors
        method = load_method(case.method)
        job = pack_embeddings(replace(Job.select(loaded, case.quant, tokens()), workspace=tiny.Kept(state)))
        found["series"] = by_name(method.run(job, method.config(**settings)).series)
    weights = {name: layer.quantized[:3] for name, layer in packed_weights(loaded.model).items()}
    found["weights"] = {name: torch.cat([part.float().flatten() for part in parts]) for name, parts in weights.items()}
    found["rest"] = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    return found


class Stopped(Exception):
    """Ends a training where a kill would."""


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """End a training after ``after`` steps."""

    def log(workspace: object, phase: str, step: int, figures: object) -> None:
        if step == after:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.Kept, "log", log)
        yield


def main(folder: Path, device: str) -> None:
    """Run every case in this process, one of several that split the model."""
    torch.set_num_threads(1)
    distributed.start(torch.device(device))
    state = folder / "states"
    for name, case in CASES.items():
        found = train_case(case, folder, state / f"{name}-{distributed.world_size()}", "full", device)
        torch.save(found, folder / f"{name}-{distributed.rank()}.pt")
    for name, whole in KILLED.items():
        again = state / f"{name}-{distributed.world_size()}"
        with pytest.raises(Stopped), stopping(after=3):
            train_case(CASES[whole], folder, again, "full", device)
        killed = sorted(file.name for file in (again / "training").iterdir())
        found = train_case(CASES[whole], folder, again, "full", device)
        torch.save(found | {"files": killed}, folder / f"{name}-{distributed.rank()}.pt")
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
