"""Token perplexity, KL divergence and top-1 agreement on windows of text.

Logits are the largest tensors here. So they are made of the final hidden states for as many tokens at a time as fit
into ``LOGIT_BYTES`` (``models/readout.py``); of a model that makes them of more, for as many windows as fit.
Log-probabilities are computed in float32 for a few tokens at a time. Means are taken in float64. Standard errors are
over windows: the tokens of a window depend on each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qtool.models.readout import Readout, readout_of
from qtool.reports.records import Metric
from qtool.system import progress
from qtool.system.tensors import size_for

LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # largest size of the logits of one forward
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # number of logits in float32 at once; a CPU's caches hold 2**18
TOKENS_AT_ONCE = 2048  # number of tokens of a batch of windows whose logits are made in parts
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
    few = windows[:1]
    ends = [readout_of(m, few.to(m.device)) for m in models]
    length, rows = windows.shape[1], windows.shape[1]
    if all(ends):
        rows = _rows_at_once(models)
    size = _batch_size(models, length, rows) if batch_size == "auto" else batch_size
    batches = windows.split(min(size, len(windows)))
    columns: list[list[Tensor]] = []
    for batch in progress.track(batches, title, len(batches)):
        sources = [_logits_of(m, end if all(ends) else None, batch) for m, end in zip(models, ends, strict=True)]
        for index, window in enumerate(batch):
            labels = window[1:].to(model.device)
            sums = torch.zeros(len(models) + 2 * compare, dtype=torch.float64, device=labels.device)
            for start in range(0, length - 1, rows):
                part = slice(start, min(start + rows, length - 1))
                _add_scores([source(index, part) for source in sources], labels[part], compare, sums)
            columns.append(list(sums))
    table = torch.stack([torch.stack(column) for column in columns]).cpu() / (windows.shape[1] - 1)
    nll, reference_nll, kl, agreement, *_ = [*table.unbind(1), None, None, None]
    assert nll is not None
    return WindowScores(nll, reference_nll, kl, agreement, windows.shape[0] * (windows.shape[1] - 1))


def _logits_of(model: PreTrainedModel, end: Readout | None, batch: Tensor) -> Callable[[int, slice], Tensor]:
    """Return a function that gives the logits ``[n, vocabulary]`` of some tokens of a window of ``batch`` ``[b, t]``.

    With ``end`` they are made when they are asked for, otherwise all of them now.
    """
    tokens = batch.to(model.device)
    if end is None:
        whole = model(tokens, use_cache=False).logits
        return lambda index, part: whole[index, part]
    hidden = end.hidden({"input_ids": tokens})
    return lambda index, part: end.logits(hidden[index, part])


def _add_scores(logits: Sequence[Tensor], labels: Tensor, compare: bool, sums: Tensor) -> None:
    """Add the sums over the rows of ``logits`` ``[n, vocabulary]``: nll of each model, then kl and agreement."""
    device = labels.device
    size = _chunk_rows(device, logits[0].shape[-1])
    for label, *chunks in zip(labels.split(size), *(one.to(device).split(size) for one in logits), strict=True):
        logs = [F.log_softmax(chunk.float(), -1) for chunk in chunks]
        for index, log in enumerate(logs):
            sums[index] += F.nll_loss(log, label, reduction="sum")
        if compare:
            mine, other = logs
            sums[-1] += (mine.argmax(-1) == other.argmax(-1)).sum()
            sums[-2] += torch.linalg.vecdot(other.exp(), other - mine).sum()


def _chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Return how many rows of logits are in float32 at once."""
    return max(1, size_for(device, CHUNK_NUMBERS) // vocabulary)


def _token_bytes(models: Sequence[PreTrainedModel]) -> int:
    """Return the bytes of the logits of one token, of all models."""
    total: int = sum(m.config.get_text_config().vocab_size * m.dtype.itemsize for m in models)
    return total


def _rows_at_once(models: Sequence[PreTrainedModel]) -> int:
    """Return how many tokens have logits within ``LOGIT_BYTES``: whole chunks, so that sums are in the same order."""
    device, vocabulary = models[0].device, models[0].config.get_text_config().vocab_size
    chunk = _chunk_rows(device, vocabulary)
    return max(1, size_for(device, LOGIT_BYTES) // _token_bytes(models) // chunk) * chunk


def _batch_size(models: Sequence[PreTrainedModel], length: int, rows: int) -> int:
    """Return how many windows of ``length`` tokens are read at once.

    Those whose logits are within ``LOGIT_BYTES``; where logits are made for ``rows`` tokens at a time, those of
    ``TOKENS_AT_ONCE`` tokens, if these are more.
    """
    fit = size_for(models[0].device, LOGIT_BYTES) // (length * _token_bytes(models))
    many = TOKENS_AT_ONCE // length if rows < length else 1
    return max(1, many, min(64, fit))


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
