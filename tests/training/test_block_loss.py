"""The loss of training one block."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.methods import generator
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job
from qtool.blocks.tables import HeadBlock
from qtool.blocks.task import BlockTask
from qtool.config.quant import QuantConfig
from qtool.methods._starts import PLAIN
from qtool.methods.rtn import round_to_nearest
from qtool.training.block_loss import BlockLoss, loss_of


def test_every_token_and_channel_counts_by_its_own_size() -> None:
    """A token whose state is a hundred times as large, as the first of a window has it, counts as the others do."""
    goal = torch.randn(5, 3, 4, generator=generator(0))
    output = goal[[4, 1]] + 0.1 * torch.randn(2, 3, 4, generator=generator(1))
    unit = goal / goal.square().mean(-1, keepdim=True).sqrt()
    share = unit.square().flatten(0, 1).mean(0)
    expected = sum(
        ((output[i, t] - goal[w, t]).square() / share).sum() / goal[w, t].square().mean()
        for i, w in enumerate([4, 1])
        for t in range(3)
    )
    torch.testing.assert_close(BlockLoss(HiddenStates(None, goal.split(2))).summed([4, 1], output), expected)
    size = torch.logspace(-1, 2, 15).view(5, 3, 1)
    scaled = BlockLoss(HiddenStates(None, (goal * size).split(2))).summed([4, 1], output * size[[4, 1]])
    torch.testing.assert_close(scaled, expected)


def test_the_largest_channel_does_not_hide_the_others() -> None:
    """One channel of Gemma 3 has nine tenths of the squares: an error of the others costs as much as one of it."""
    goal = torch.randn(4, 8, 16, generator=generator(0))
    goal[..., 3] = 300 + goal[..., 3]
    loss = BlockLoss(HiddenStates(None, [goal]))
    wrong = [goal * torch.where(torch.arange(16) == channel, 1.1, 1.0) for channel in (3, 5)]
    large, small = (float(loss.summed([0, 1, 2, 3], outputs)) for outputs in wrong)
    assert large == pytest.approx(small, rel=1e-3)


def test_a_state_of_zeros_has_a_finite_gradient() -> None:
    goal = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])
    output = goal.clone().requires_grad_()
    loss = BlockLoss(HiddenStates(None, [goal])).summed([0, 1], output)
    (gradient,) = torch.autograd.grad(loss, output)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_loss_of_a_head_is_the_mean_square_of_its_outputs_of_all_tokens(tmp_path: Path, tokens: Tensor) -> None:
    """The rows that it reads stand for the tokens in a plain sum alone."""
    folder = tiny.llama(tmp_path / "model", dtype=torch.float32, tied=False)
    quant = {"num_bits": 2, "group_size": 32, "head": {"num_bits": 4, "group_size": 32}}
    job, seen = Job.select(tiny.load(folder), QuantConfig.model_validate(quant), tokens), []
    expected: list[float] = []

    def visit(task: BlockTask) -> None:
        task.pass_floats()
        if isinstance(task.block, HeadBlock):
            (target,) = task.targets
            loss, x = loss_of(task, "mse"), torch.cat(list(task.inputs))
            error = torch.randn(target.weight.shape, generator=generator(0)) * torch.logspace(-1, 1, 320).unsqueeze(1)
            outputs, change = torch.cat(list(task.float_outputs or ())), x @ error.T
            windows = list(range(len(x)))
            seen.append(float(loss.summed(windows, outputs + change)) / loss.count(windows))
            expected.append(float(change.square().mean() / outputs.square().mean()))
        for target in task.targets:
            task.pack(target, round_to_nearest(target.weight, target.spec, PLAIN))

    run_blocks(job, visit, with_float_states=True)
    assert seen == [pytest.approx(expected[0], rel=1e-3)]
