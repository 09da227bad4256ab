"""Losses against their closed forms, and each other in the limits in which they are the same."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.training import EndToEndConfig
from qtool.training.losses import confidence, cross_entropy, kl, token_losses, top_k_kl

N, V = 5, 13
LABELS = torch.tensor([0, 3, 12, 7, 3])


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.mean(), x)[0]


def test_cross_entropy_is_the_log_of_the_true_tokens_probability() -> None:
    x = logits(0).requires_grad_()
    q = x.softmax(-1)
    loss = cross_entropy(x, LABELS)
    assert torch.allclose(loss, -q[torch.arange(N), LABELS].log(), atol=1e-6)
    assert torch.allclose(gradient(loss, x), (q - torch.eye(V)[LABELS]) / N, atol=1e-6)
    assert torch.allclose(confidence(x, LABELS), q[torch.arange(N), LABELS], atol=1e-6)


@given(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_the_gradient_of_kl_is_the_difference_of_probabilities(t: float) -> None:
    teacher, x = logits(1), logits(2).requires_grad_()
    p, q = (teacher / t).softmax(-1), (x / t).softmax(-1)
    loss = kl(teacher, x, t)
    assert torch.allclose(loss, t * t * (p * (p / q).log()).sum(-1), atol=1e-5)
    assert torch.allclose(gradient(loss, x), t * (q - p) / N, atol=1e-6)


def test_the_gradient_of_reverse_kl_has_its_closed_form() -> None:
    """``q_i (log(q_i / p_i) - KL(q || p))``."""
    teacher, x = logits(1), logits(2).requires_grad_()
    p, q = teacher.softmax(-1), x.softmax(-1)
    loss = kl(x, teacher)
    expected = q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True)) / N
    assert torch.allclose(gradient(loss, x), expected, atol=1e-6)


def test_top_k_kl_is_that_of_the_merged_distribution() -> None:
    teacher, x = logits(1), logits(2).requires_grad_()
    p, q = teacher.softmax(-1), x.softmax(-1)
    top = p.topk(4).indices
    merged = [torch.cat([r.gather(-1, top), 1 - r.gather(-1, top).sum(-1, keepdim=True)], -1) for r in (p, q)]
    loss = top_k_kl(teacher, x, 4)
    assert torch.allclose(loss, (merged[0] * (merged[0] / merged[1]).log()).sum(-1), atol=1e-5)
    ratio = torch.ones(N, V) * merged[0][:, -1:] / merged[1][:, -1:]  # p / q of each token's bucket
    ratio.scatter_(-1, top, merged[0][:, :-1] / merged[1][:, :-1])
    assert torch.allclose(gradient(loss, x), (q - q * ratio) / N, atol=1e-6)


@given(st.integers(1, 12), st.sampled_from([1.0, 2.0]))
def test_top_k_kl_grows_to_kl(k: int, t: float) -> None:
    """What is told apart can only add; with all but one told apart nothing is merged."""
    teacher, x = logits(3), logits(4)
    whole = kl(teacher, x, t)
    assert bool((top_k_kl(teacher, x, k, t) <= top_k_kl(teacher, x, k + 1, t) + 1e-5).all())
    for enough in (V - 1, V, 99):
        assert torch.allclose(top_k_kl(teacher, x, enough, t), whole, atol=1e-5)


def test_a_rest_too_small_for_one_minus_the_others_keeps_its_gradient() -> None:
    teacher = torch.zeros(1, V)
    teacher[0, 0] = 40.0
    x = teacher.clone().requires_grad_()
    loss = top_k_kl(teacher, x, 1)
    assert float(loss.detach().sum()) == pytest.approx(0.0, abs=1e-6)
    assert bool(torch.isfinite(gradient(loss, x)).all())


def chosen(loss: str, teacher: Tensor | None, x: Tensor, gamma: float = 0.0, **settings: Any) -> Tensor:
    return token_losses(EndToEndConfig.model_validate({"loss": loss, **settings}), x, teacher, LABELS, gamma)


def test_each_name_is_its_loss() -> None:
    teacher, x = logits(1), logits(2)
    hard, forward, reverse = cross_entropy(x, LABELS), kl(teacher, x, 2.0), kl(x, teacher, 2.0)
    assert torch.equal(chosen("ce", None, x), hard)
    assert torch.equal(chosen("kl", teacher, x, temperature=2.0), forward)
    assert torch.equal(chosen("reverse-kl", teacher, x, temperature=2.0), reverse)
    assert torch.equal(chosen("topk-kl", teacher, x, top_k=3), top_k_kl(teacher, x, 3))
    mixed = chosen("mixed", teacher, x, temperature=2.0, ce_share=0.25)
    assert torch.allclose(mixed, 0.25 * hard + 0.75 * forward)
    assert torch.allclose(chosen("cakld", teacher, x, 0.3, temperature=2.0), 0.3 * reverse + 0.7 * forward)


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "topk-kl", "cakld"])
def test_a_student_that_is_its_teacher_has_nothing_to_lose(loss: str) -> None:
    x = logits(2).requires_grad_()
    found = chosen(loss, x.detach(), x, 0.4)
    assert found.shape == (N,)
    assert torch.allclose(found, torch.zeros(N), atol=1e-6)
    assert torch.allclose(gradient(found, x), torch.zeros(N, V), atol=1e-6)


def test_logits_in_half_precision_are_compared_in_float32() -> None:
    teacher, x = logits(1).bfloat16(), logits(2).bfloat16()
    for loss in ("ce", "kl", "topk-kl"):
        assert torch.equal(chosen(loss, teacher, x), chosen(loss, teacher.float(), x.float()))
