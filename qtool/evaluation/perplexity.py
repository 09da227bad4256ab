"""Token perplexity, KL divergence and top-1 agreement on windows of text.

Logits are the largest tensors here. So ``batch_size: auto`` fits the logits of one forward into ``LOGIT_BYTES``; where
those of the smallest batch are larger, they are made of the final hidden states for a few tokens at a time
(``models/readout.py``). Log-probabilities are computed in float32, for a few tokens at a time too. Means are taken in
float64. Standard errors are over windows: the tokens of a window depend on each other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qtool.config.sections import AGREEMENT, PERCENTILES
from qtool.models.readout import Readout, readout_of
from qtool.reports.records import Metric
from qtool.system import progress
from qtool.system.tensors import size_for

LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # largest size of the logits of one forward
LEAST_PART = 128  # least number of predictions in a part: products of fewer are bound by reading the weight of the head
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # number of logits in float32 at once; a CPU's caches hold 2**18
BatchSize = int | Literal["auto"]


class WindowScores(NamedTuple):
    """Means over the predictions of each window, float64 ``[n]``; all but ``nll`` need a reference model."""

    nll: Tensor
    reference_nll: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    num_predictions: int
    token_kl: Tensor | None = None
    """KL divergence of each prediction, float32 ``[n (t - 1)]``, from the lowest to the highest."""


def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: BatchSize) -> Metric:
    """Return the token perplexity on ``windows`` ``[n, t]``: exp of the mean negative log-likelihood per prediction.

    Each window has ``t - 1`` predictions. The standard error is over windows, by the delta method.
    """
    return perplexity_metric(score_windows(model, None, windows, batch_size, False, "perplexity").nll, windows)


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor, batch_size: BatchSize
) -> dict[str, Metric]:
    """Return the metrics of KL(reference || model), in nats per token, as :func:`divergence_metrics` does.

    Predictions are those of :func:`perplexity`.
    """
    return divergence_metrics(score_windows(model, reference, windows, batch_size, True, "divergence"))


def divergence_metrics(scores: WindowScores) -> dict[str, Metric]:
    """Return the mean KL divergence, its percentiles over predictions, and the share of equal top-1 predictions.

    Standard errors are over windows; percentiles have none.
    """
    assert scores.kl is not None
    assert scores.agreement is not None
    assert scores.token_kl is not None
    n = scores.num_predictions
    percentiles = {name: Metric(value=percentile(scores.token_kl, share), n=n) for name, share in PERCENTILES.items()}
    return {"kl": mean_metric(scores.kl, n), **percentiles, AGREEMENT: mean_metric(scores.agreement, n)}


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
    return score_models([model], reference, windows, batch_size, compare, title)[0]


@torch.inference_mode()
def score_models(
    models: Sequence[PreTrainedModel],
    reference: PreTrainedModel | None,
    windows: Tensor,
    batch_size: BatchSize,
    compare: bool,
    title: str,
) -> list[WindowScores]:
    """Score ``windows`` ``[n, t]`` with each of ``models``, beside one pass of ``reference``.

    The scores of each are those of :func:`score_windows`.
    """
    others = [] if reference is None else [reference]
    size = _batch_size([*models, *others], windows.shape[1]) if batch_size == "auto" else batch_size
    batches = windows.split(min(size, len(windows)))
    predictions, part, rows = _predictions(models, others, batches[0])
    sums: list[list[Tensor]] = [[] for _ in models]
    found: list[list[Tensor]] = [[] for _ in models]
    for batch in progress.track(batches, title, len(batches)):
        logits = [each(batch) for each in predictions]
        for index, window in enumerate(batch):
            parts = [one(index) for one in logits]
            beside = parts.pop() if others else None
            scores = _score_window(parts, beside, window[1:].to(models[0].device).split(part), rows, compare)
            for place, (own_sums, token_kl) in enumerate(scores):
                sums[place].append(own_sums)
                found[place].append(token_kl)
    return [_scores(*each, windows, compare) for each in zip(sums, found, strict=True)]


def _scores(sums: list[Tensor], found: list[Tensor], windows: Tensor, compare: bool) -> WindowScores:
    """Return the scores of a model from the sums of each of ``windows`` and the divergence of each prediction."""
    table = torch.stack(sums).cpu() / (windows.shape[1] - 1)
    nll, reference_nll, kl, agreement, *_ = [*table.unbind(1), None, None, None]
    assert nll is not None
    num_predictions = windows.shape[0] * (windows.shape[1] - 1)
    token_kl = torch.cat(found).sort().values if compare else None
    return WindowScores(nll, reference_nll, kl, agreement, num_predictions, token_kl)


Parts = Iterator[Tensor]  # logits ``[part, vocabulary]`` of the predictions of a window, some at a time, in order
Predictions = Callable[[Tensor], Callable[[int], Parts]]  # windows [b, t] -> index of a window -> its parts


def _predictions(
    models: Sequence[PreTrainedModel], others: Sequence[PreTrainedModel], batch: Tensor
) -> tuple[list[Predictions], int, int]:
    """Return how each of ``models``, then of ``others``, predicts ``batch`` and others like it.

    Also return the number of predictions in a part, and how many of them to score at once. Where the logits of a batch
    do not fit whole, a part is as large as the logits of one of ``models`` and of ``others`` permit, but not too small.
    """
    every = [*models, *others]
    length = batch.shape[1] - 1
    device = models[0].device
    vocabulary: int = max(model.config.get_text_config().vocab_size for model in every)
    rows = max(1, size_for(device, CHUNK_NUMBERS) // vocabulary)
    if batch.numel() <= _fitting(device, vocabulary, every):
        return [partial(_whole, model, length) for model in every], length, rows
    fitting = _fitting(device, vocabulary, [models[0], *others])
    count = math.ceil(length / max(fitting, LEAST_PART, rows))
    part = rows * math.ceil(length / count / rows)  # a multiple, so that what is scored at once does not depend on it
    ends = [readout_of(model, batch.to(model.device)) for model in every]
    for model, end in zip(every, ends, strict=True):
        if end is None:
            progress.note(
                f"the logits of {type(model).__name__} are made of more than its final hidden states; those of a whole "
                "batch are held at once"
            )
    predictions: list[Predictions] = [
        partial(_whole, model, part) if end is None else partial(_read, end, part)
        for model, end in zip(every, ends, strict=True)
    ]
    return predictions, part, rows


def _fitting(device: torch.device, vocabulary: int, models: Sequence[PreTrainedModel]) -> int:
    """Return for how many tokens the logits of all ``models`` fit into ``LOGIT_BYTES``; at least one."""
    return max(1, size_for(device, LOGIT_BYTES) // sum(vocabulary * model.dtype.itemsize for model in models))


def _whole(model: PreTrainedModel, part: int, batch: Tensor) -> Callable[[int], Parts]:
    """Predict ``batch`` ``[b, t]`` by one forward; a window's predictions come ``part`` at a time."""
    logits = model(batch.to(model.device), use_cache=False).logits
    return lambda index: iter(logits[index, :-1].split(part))


def _read(end: Readout, part: int, batch: Tensor) -> Callable[[int], Parts]:
    """Predict ``batch`` ``[b, t]`` with the logits of ``part`` tokens at once."""
    hidden = end.hidden({"input_ids": batch.to(end.device)})
    return lambda index: (end.logits(some) for some in hidden[index, :-1].split(part))


def _score_window(
    predicted: Sequence[Parts], reference: Parts | None, labels: Sequence[Tensor], rows: int, compare: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return what :func:`_score_part` returns of each of ``predicted``, for a whole window.

    ``labels`` are the true tokens of each part. One part of ``reference`` serves all models, whose parts exist one
    after the other.
    """
    scores: list[list[tuple[Tensor, Tensor]]] = [[] for _ in predicted]
    for label in labels:
        beside = None if reference is None else next(reference)
        for found, parts in zip(scores, predicted, strict=True):
            found.append(_score_part(next(parts), beside, label, rows, compare))
    return [(torch.stack([one for one, _ in found]).sum(0), torch.cat([kl for _, kl in found])) for found in scores]


def _score_part(mine: Tensor, beside: Tensor | None, labels: Tensor, rows: int, compare: bool) -> tuple[Tensor, Tensor]:
    """Return sums over the predictions with the logits ``mine`` ``[n, vocabulary]``, and the kl of each of them.

    The sums, in float64, are nll, nll of the logits ``beside`` if there are any, then, with ``compare``, kl and
    agreement. ``labels`` ``[n]`` are the true tokens; ``rows`` of them are scored at once.
    """
    device = labels.device
    pair = [mine] if beside is None else [mine, beside]
    sums = torch.zeros(len(pair) + 2 * compare, dtype=torch.float64, device=device)
    found = []
    for label, *chunks in zip(labels.split(rows), *(logits.split(rows) for logits in pair), strict=True):
        logs = [F.log_softmax(chunk.to(device).float(), -1) for chunk in chunks]
        for index, log in enumerate(logs):
            sums[index] += F.nll_loss(log, label, reduction="sum")
        if compare:
            own, other = logs
            sums[-1] += (own.argmax(-1) == other.argmax(-1)).sum()
            found.append(torch.linalg.vecdot(other.exp(), other - own))
            sums[-2] += found[-1].sum()
    return sums, torch.cat(found).cpu() if compare else labels.new_empty(0)


def percentile(ordered: Tensor, share: float) -> float:
    """Return the number below which the ``share`` of ``ordered`` ``[n]``, in rising order, lies.

    Between two numbers it is interpolated linearly, as llama.cpp's ``--kl-divergence`` does.
    """
    at = share * (len(ordered) - 1)
    below = int(at)
    low, high = (float(ordered[min(place, len(ordered) - 1)]) for place in (below, below + 1))
    return low if at == below else low + (at - below) * (high - low)


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
