"""Losses of training on text: next-token cross entropy, and divergences from the float model.

Each function returns one float32 number per token, from logits ``[n, vocabulary]``. With ``p`` the teacher's and ``q``
the student's distribution at temperature ``T``, forward KL is ``T**2 sum p log(p / q)``: the square keeps the size of
gradients. Means are over tokens, never over batches, so that a learning rate suits every window length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.config.sections import IGNORED
from qtool.config.training import EndToEndConfig

CE, HIDDEN = "ce", "hidden"


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log q`` of each true token; ``labels`` ``[n]``."""
    return F.cross_entropy(student.float(), labels, reduction="none")


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of ``logits`` ``[n, vocabulary]``, summed over the ``labels`` that are not ignored."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the forward KL divergence; with the arguments exchanged, it is the reverse KL divergence."""
    log_p, log_q = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2


def top_k_kl(teacher: Tensor, student: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return the forward KL divergence over the teacher's ``k`` most likely tokens and all others taken as one."""
    k = min(k, teacher.shape[-1] - 1)
    index = teacher.topk(k, dim=-1).indices

    def buckets(logits: Tensor) -> Tensor:
        """Return log probabilities ``[n, k + 1]``; the rest is summed, as one minus the others would lose digits."""
        scaled = logits.float() / temperature
        rest = scaled.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([scaled.gather(-1, index), rest], -1) - scaled.logsumexp(-1, keepdim=True)

    return F.kl_div(buckets(student), buckets(teacher), log_target=True, reduction="none").sum(-1) * temperature**2


def confidence(teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the teacher's probability of each true token."""
    return cross_entropy(teacher, labels).neg().exp()


def hidden_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of hidden states ``[n, d]`` for each token."""
    return (student.float() - teacher.float()).square().mean(-1)


def token_losses(
    config: EndToEndConfig, student: Tensor, teacher: Tensor | None, labels: Tensor, gamma: float = 0.0
) -> Tensor:
    """Return the loss ``config.loss`` of each token; ``gamma`` is the share of reverse KL in CAKLD."""
    if config.loss == CE:
        return cross_entropy(student, labels)
    assert teacher is not None, "every loss but cross entropy compares with a teacher"
    if config.loss == "topk-kl":
        return top_k_kl(teacher, student, config.top_k, config.temperature)
    if config.loss == "reverse-kl":
        return kl(student, teacher, config.temperature)
    forward = kl(teacher, student, config.temperature)
    if config.loss == "mixed":
        return config.ce_share * cross_entropy(student, labels) + (1 - config.ce_share) * forward
    if config.loss == "cakld":
        return gamma * kl(student, teacher, config.temperature) + (1 - gamma) * forward
    return forward
