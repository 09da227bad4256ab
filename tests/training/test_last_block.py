"""The last block trained on predictions: the loss is KL through the norm and the head, however the head is packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job
from qtool.blocks.tables import pack_embeddings
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.models.linears import Target
from qtool.quant.affine import QuantizedWeight, minmax_qparams, quantize
from qtool.training import sliced
from qtool.training.block_loss import BlockLoss, loss_of
from qtool.training.losses import kl

W2 = {"num_bits": 2, "group_size": 32, "symmetric": False}
ROWS = {"num_bits": 8, "group_size": -1}
TABLES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {},
    "tied packed": {"embedding": ROWS},
    "untied packed": {"embedding": ROWS, "head": ROWS},
    "head packed": {"head": ROWS},
}


def job_of(folder: Path, quant: dict[str, Any], tokens: Tensor) -> Job:
    return pack_embeddings(Job.select(tiny.load(folder), QuantConfig.model_validate(W2 | quant), tokens))


@pytest.mark.parametrize("size", [1 << 28, 4 * tiny.VOCABULARY * 7], ids=["whole", "slices"])
@pytest.mark.parametrize("case", TABLES)
def test_the_loss_is_the_divergence_of_the_whole_model(
    case: str, size: int, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed table is the student's, and the float one the teacher's; a head among the targets is float still."""
    monkeypatch.setattr(sliced, "SLICE_BYTES", {"cpu": size})
    monkeypatch.setattr(sliced, "LEAST_TOKENS", 1)
    folder = tiny.llama(tmp_path / "model", dtype=torch.float32, tied=case.startswith("tied"))
    job, seen = job_of(folder, TABLES[case], tokens), []

    def visit(task: BlockTask) -> None:
        task.pass_floats()
        if task.is_last:
            for parameter in task.block.parameters():
                parameter.data = parameter.data * 1.1
            outputs = torch.cat(list(task.through(task.inputs))).requires_grad_()
            with torch.enable_grad():
                loss = loss_of(task, "kl")
                found = loss.summed([0, 1, 2, 3, 4], outputs)
                (gradient,) = torch.autograd.grad(found, outputs)
            assert loss.count([1, 3]) == 2 * tokens.shape[1]
            part = loss.summed([3, 1], outputs[[3, 1]])
            seen.extend([found.detach(), outputs.detach(), gradient, part])
        else:
            assert type(loss_of(task, "kl")) is BlockLoss
        for target in task.targets:
            task.pack(target, rounded(target))

    run_blocks(job, visit, with_float_states=True)
    found, outputs, gradient, part = seen
    model: Any = job.loaded.model
    pristine: Any = tiny.load(folder).model
    teacher = pristine(tokens).logits.flatten(0, 1)
    head = pristine.lm_head if job.tables.head else model.lm_head
    x = outputs.clone().requires_grad_()
    expected = kl(teacher, head(model.model.norm(x)).flatten(0, 1)).view(tokens.shape)
    assert float(found) == pytest.approx(float(expected.sum().detach()), rel=1e-4)
    assert float(part) == pytest.approx(float(expected[[3, 1]].sum().detach()), rel=1e-4)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def rounded(target: Target) -> QuantizedWeight:
    grid = minmax_qparams(target.weight, target.spec)
    return QuantizedWeight(quantize(target.weight, *grid, target.spec), *grid, target.spec)
