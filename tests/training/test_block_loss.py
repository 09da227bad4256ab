"""The loss of training one block."""

import torch
from helpers.methods import generator

from qtool.blocks.hidden_states import HiddenStates
from qtool.training.block_loss import BlockLoss


def test_every_token_counts_by_its_own_size() -> None:
    """A token whose state is a hundred times as large, as the first of a window has it, counts as the others do."""
    goal = torch.randn(5, 3, 4, generator=generator(0))
    output = goal[[4, 1]] + 0.1 * torch.randn(2, 3, 4, generator=generator(1))
    expected = sum(
        (output[i, t] - goal[w, t]).square().sum() / goal[w, t].square().mean()
        for i, w in enumerate([4, 1])
        for t in range(3)
    )
    torch.testing.assert_close(BlockLoss(HiddenStates(None, goal.split(2))).summed([4, 1], output), expected)
    size = torch.logspace(-1, 2, 15).view(5, 3, 1)
    scaled = BlockLoss(HiddenStates(None, (goal * size).split(2))).summed([4, 1], output * size[[4, 1]])
    torch.testing.assert_close(scaled, expected)


def test_a_state_of_zeros_has_a_finite_gradient() -> None:
    goal = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])
    output = goal.clone().requires_grad_()
    loss = BlockLoss(HiddenStates(None, [goal])).summed([0, 1], output)
    (gradient,) = torch.autograd.grad(loss, output)
    assert torch.equal(gradient, torch.zeros_like(gradient))
