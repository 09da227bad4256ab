"""Token perplexity, KL divergence and top-1 agreement on windows of text.

Logits are the largest tensors here. So ``batch_size: auto`` fits the logits of one forward into ``LOGIT_BYTES``, and
log-probabilities are computed in float32 for a few tokens at a time. Means are taken in float64. Standard errors are
over windows: the tokens of a window depend on each other.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qtool.reports.records import Metric
from qtool.system import progress
from qtool.system.tensors import size_for

LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # largest size of the logits of one forward
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # number of logits in float32 at once; a CPU's caches hold 2**18
BatchSize = int | Literal["auto"]


class WindowScores(NamedTuple):
    """Means over the predictions of each window, float64 ``[n]``; all but ``nll`` need a reference model."""

    nll: Tensor
    reference_nll: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    num_predictions: int


def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: BatchSize) -> Metric:
    """Return the token perplexity on ``windows`` ``[n, t]``: exp of the mean negative log-likelihood per prediction.

    Each window has ``t - 1`` predictions. The standard error is over windows, by the delta method.
    """
    return perplexity_metric(score_windows(model, None, windows, batch_size, False, "perplexity").nll, windows)


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor, batch_size: BatchSize
) -> tuple[Metric, Metric]:
    """Return the mean KL(reference || model) in nats per token, and the share of tokens with the same top-1 prediction.

    Predictions are those of :func:`perplexity`; standard errors are over windows.
    """
    scores = score_windows(model, reference, windows, batch_size, True, "divergence")
    assert scores.kl is not None
    assert scores.agreement is not None
    return mean_metric(scores.kl, scores.num_predictions), mean_metric(scores.agreement, scores.num_predictions)


@torch.inference_mode()
def score_windows(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    windows: Tensor,
    batch_size: BatchSize,
    compare: bool,
    title: str,
) -> WindowScores:
    """Score ``windows`` ``[n, t]`` with ``model`` and, in the same pass, with ``reference``.

    ``compare`` adds the scores that need the logits of both: ``kl`` and ``agreement``.
    """
    models = [model] if reference is None else [model, reference]
    size = _batch_size(models, windows.shape[1]) if batch_size == "auto" else batch_size
    batches = windows.split(min(size, len(windows)))
    columns: list[list[Tensor]] = []
    for batch in progress.track(batches, title, len(batches)):
        logits = [m(batch.to(m.device), use_cache=False).logits for m in models]
        for index, window in enumerate(batch):
            columns.append(_score_window([one[index, :-1] for one in logits], window[1:].to(model.device), compare))
    table = torch.stack([torch.stack(column) for column in columns]).cpu() / (windows.shape[1] - 1)
    nll, reference_nll, kl, agreement, *_ = [*table.unbind(1), None, None, None]
    assert nll is not None
    return WindowScores(nll, reference_nll, kl, agreement, windows.shape[0] * (windows.shape[1] - 1))


def _score_window(logits: Sequence[Tensor], labels: Tensor, compare: bool) -> list[Tensor]:
    """Return sums over the rows of ``logits`` ``[t - 1, vocabulary]``: nll of each model, then kl and agreement."""
    device = labels.device
    size = max(1, size_for(device, CHUNK_NUMBERS) // logits[0].shape[-1])
    sums = torch.zeros(len(logits) + 2 * compare, dtype=torch.float64, device=device)
    for label, *chunks in zip(labels.split(size), *(one.to(device).split(size) for one in logits), strict=True):
        logs = [F.log_softmax(chunk.float(), -1) for chunk in chunks]
        for index, log in enumerate(logs):
            sums[index] += F.nll_loss(log, label, reduction="sum")
        if compare:
            mine, other = logs
            sums[-1] += (mine.argmax(-1) == other.argmax(-1)).sum()
            sums[-2] += torch.linalg.vecdot(other.exp(), other - mine).sum()
    return list(sums)


def _batch_size(models: Sequence[PreTrainedModel], length: int) -> int:
    """Return how many windows of ``length`` tokens have logits within ``LOGIT_BYTES``."""
    per_window: int = sum(length * m.config.get_text_config().vocab_size * m.dtype.itemsize for m in models)
    return max(1, min(64, size_for(models[0].device, LOGIT_BYTES) // per_window))


def mean_metric(values: Tensor, n: int) -> Metric:
    """Return the mean of ``values`` ``[windows]`` and its standard error; ``n`` is the number of predictions."""
    stderr = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return Metric(value=values.mean().item(), stderr=stderr, n=n)


def perplexity_metric(nll: Tensor, windows: Tensor) -> Metric:
    """Return the perplexity of ``nll``, the mean negative log-likelihood of each of ``windows`` ``[n, t]``."""
    mean = mean_metric(nll, windows.shape[0] * (windows.shape[1] - 1))
    value = nll.mean().exp().item()
    return Metric(value=value, stderr=None if mean.stderr is None else value * mean.stderr, n=mean.n)


def change_stderr(nll: Tensor, reference_nll: Tensor) -> float | None:
    """Return the standard error of the change in perplexity; on the same windows, most of the spread cancels."""
    change = nll.mean().exp() * nll - reference_nll.mean().exp() * reference_nll
    return mean_metric(change, len(nll)).stderr
