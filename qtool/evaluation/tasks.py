"""How good a model is: token perplexity, divergence from the float model, and lm-eval's tasks.

``wikitext2``, ``generated`` and ``kl`` are measured here, on windows of text; any other name is a task of lm-eval. The
quantized and the float model go through the same code on the same windows, in one pass where both are at hand.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qtool.config.sections import METRICS, EvalConfig
from qtool.data.readers import UnreachableError
from qtool.data.windows import GENERATED, perplexity_windows
from qtool.evaluation.contamination import Seen, overlap, relation
from qtool.models import backend
from qtool.models.loading import LoadedModel
from qtool.reports.records import Metric, TaskResult, task_result
from qtool.system import progress
from qtool.system.errors import InputError

WIKITEXT = "wikitext2"
DIVERGENCE = "kl"
OWN_TASKS = tuple(METRICS)
LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # of one forward pass
CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits worked on at once in float32; on a CPU, what its caches hold
BatchSize = int | Literal["auto"]


class WindowScores(NamedTuple):
    """Means over the predictions of each window, float64 ``[n]``; the last three need a reference model."""

    nll: Tensor
    reference_nll: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    num_predictions: int


def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: BatchSize) -> Metric:
    """Token perplexity on ``windows [n, t]``: exp of the mean negative log-likelihood of ``t - 1`` predictions in each.

    The standard error is over windows, by the delta method.
    """
    return _perplexity(score_windows(model, None, windows, batch_size, False, "perplexity").nll, windows)


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor, batch_size: BatchSize
) -> tuple[Metric, Metric]:
    """Mean KL(reference || model) in nats per token, and the share of tokens on whose most likely successor both agree.

    Over the same ``t - 1`` predictions of each window as :func:`perplexity`; standard errors are over windows.
    """
    scores = score_windows(model, reference, windows, batch_size, True, "divergence")
    assert scores.kl is not None
    assert scores.agreement is not None
    return _mean(scores.kl, scores.num_predictions), _mean(scores.agreement, scores.num_predictions)


@torch.inference_mode()
def score_windows(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    windows: Tensor,
    batch_size: BatchSize,
    compare: bool,
    title: str,
) -> WindowScores:
    """Score ``windows [n, t]`` with ``model`` and, in the same pass, with ``reference``.

    ``compare`` adds what needs the logits of both: kl and agreement.
    """
    models = [model] if reference is None else [model, reference]
    batches = windows.split(_batch_size(models, windows.shape[1]) if batch_size == "auto" else batch_size)
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
    """Sums over the rows of ``logits [t - 1, vocabulary]``: nll of each model, then kl and agreement."""
    device = labels.device
    size = max(1, CHUNK_NUMBERS.get(device.type, CHUNK_NUMBERS["cpu"]) // logits[0].shape[-1])
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
    """How many windows' logits fit the budget."""
    device = models[0].device.type
    per_window: int = sum(length * m.config.get_text_config().vocab_size * m.dtype.itemsize for m in models)
    return max(1, min(64, LOGIT_BYTES.get(device, LOGIT_BYTES["cpu"]) // per_window))


def _mean(values: Tensor, n: int) -> Metric:
    """The mean over windows and its standard error; ``n`` counts predictions."""
    stderr = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return Metric(value=values.mean().item(), stderr=stderr, n=n)


def _perplexity(nll: Tensor, windows: Tensor) -> Metric:
    mean = _mean(nll, windows.shape[0] * (windows.shape[1] - 1))
    value = nll.mean().exp().item()
    return Metric(value=value, stderr=None if mean.stderr is None else value * mean.stderr, n=mean.n)


def _change_stderr(nll: Tensor, reference_nll: Tensor) -> float | None:
    """Standard error of the change in perplexity: both models read the same windows, so most of the spread cancels."""
    change = nll.mean().exp() * nll - reference_nll.mean().exp() * reference_nll
    return _mean(change, len(nll)).stderr


def check_tasks(config: EvalConfig) -> None:
    """Whether every task can be measured, before any long work; fetches the data of lm-eval's tasks.

    Raises:
        InputError: an unknown or repeated task, ``num_fewshot`` for one that is not asked for, data that cannot be had.
    """
    repeated = {task for task in config.tasks if config.tasks.count(task) > 1}
    if repeated:
        raise InputError(f"eval.tasks: {', '.join(sorted(repeated))} named more than once")
    if isinstance(config.num_fewshot, dict):
        for task in config.num_fewshot:
            if task not in config.tasks or task in OWN_TASKS:
                near = get_close_matches(task, config.tasks, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"eval.num_fewshot: {task!r} is not one of eval.tasks that have examples{hint}")
    theirs = [task for task in config.tasks if task not in OWN_TASKS]
    if theirs:
        from qtool.evaluation import harness

        harness.check(theirs, config.num_fewshot)


def evaluate(
    loaded: LoadedModel, config: EvalConfig, reference: LoadedModel | None, seed: int, seen: Seen | None = None
) -> list[TaskResult]:
    """Measure ``config.tasks``, for ``loaded`` and, beside it, for the float model ``reference`` it was made from.

    Of windows of text it is measured, too, how much of them the calibration text ``seen`` holds.

    ``kl`` is measured on WikiText-2 windows, or on generated text where WikiText-2 cannot be had. What cannot be
    measured (WikiText-2 out of reach, ``kl`` without a reference) has a row that says so.

    Raises:
        InputError: a task of lm-eval that is unknown or without data.
    """
    with backend.using(loaded.model, config.backend):
        own = _own_tasks(loaded, config, reference, seed, seen)
        rows: list[TaskResult] = []
        for task in config.tasks:
            rows += own[task] if task in OWN_TASKS else _lm_eval_task(task, loaded, config, reference)
    return [row if seen is None else _with_relation(row, seen.source) for row in rows]


def _with_relation(row: TaskResult, source: str) -> TaskResult:
    """``row`` with what a reader must know of its text and the calibration text."""
    known = relation(source, row.task) if row.value is not None else ""
    return row.model_copy(update={"note": "; ".join(filter(None, (row.note, known)))})


def _own_tasks(
    loaded: LoadedModel, config: EvalConfig, reference: LoadedModel | None, seed: int, seen: Seen | None = None
) -> dict[str, list[TaskResult]]:
    """Rows by task. Each set of windows is read once, by both models, whatever is measured on it."""
    wanted = [task for task in config.tasks if task in OWN_TASKS]
    rows: dict[str, list[TaskResult]] = {}
    windows: dict[str, Tensor] = {}
    if WIKITEXT in wanted or (DIVERGENCE in wanted and reference is not None):
        try:
            windows[WIKITEXT] = perplexity_windows(WIKITEXT, loaded, config.context, config.limit, seed)
        except UnreachableError as error:
            rows[WIKITEXT] = [_not_measured(WIKITEXT, "perplexity", str(error), config)]
    kl_on = (WIKITEXT if WIKITEXT in windows else GENERATED) if DIVERGENCE in wanted and reference is not None else None
    if DIVERGENCE in wanted and kl_on is None:
        rows[DIVERGENCE] = [_not_measured(DIVERGENCE, "kl", "there is no float model to compare with", config)]
    if GENERATED in wanted or kl_on == GENERATED:
        writer = reference or loaded
        windows[GENERATED] = perplexity_windows(GENERATED, writer, config.context, config.limit, seed)
    for name in [name for name in windows if name in wanted or name == kl_on]:
        scores = score_windows(
            loaded.model,
            reference.model if reference else None,
            windows[name],
            config.batch_size,
            name == kl_on,
            f"reading {name}",
        )
        rows[name] = [_perplexity_row(name, scores, windows[name], config, reference is not None)]
        if name == kl_on:
            rows[DIVERGENCE] = _divergence_rows(name, scores, windows[name], config)
        if seen is not None and seen.tokens is not None:
            share = overlap(seen.tokens, windows[name])
            for task in {name, DIVERGENCE} if name == kl_on else {name}:
                rows[task] = [row.model_copy(update={"overlap": share}) for row in rows[task]]
    return rows


def _not_measured(task: str, metric: str, reason: str, config: EvalConfig) -> TaskResult:
    return TaskResult(task=task, metric=metric, value=None, limit=config.limit, note=f"not measured: {reason}")


def _perplexity_row(
    name: str, scores: WindowScores, windows: Tensor, config: EvalConfig, has_reference: bool
) -> TaskResult:
    note = f"{windows.shape[0]} windows of {windows.shape[1]} tokens"
    if name == GENERATED:
        note += " that the float model wrote" if has_reference else " that this model wrote itself"
    other = None if scores.reference_nll is None else _perplexity(scores.reference_nll, windows)
    change = None if scores.reference_nll is None else _change_stderr(scores.nll, scores.reference_nll)
    return task_result(
        name,
        "perplexity",
        _perplexity(scores.nll, windows),
        other,
        delta_stderr=change,
        higher_is_better=False,
        limit=config.limit,
        note=note,
    )


def _divergence_rows(name: str, scores: WindowScores, windows: Tensor, config: EvalConfig) -> list[TaskResult]:
    note = f"against the float model on {windows.shape[0]} windows of {windows.shape[1]} tokens of {name}"
    columns = (("kl", scores.kl, False), ("top-1 agreement", scores.agreement, True))
    return [
        task_result(
            DIVERGENCE,
            metric,
            _mean(values, scores.num_predictions),
            None,
            higher_is_better=better,
            limit=config.limit,
            note=note,
        )
        for metric, values, better in columns
        if values is not None
    ]


def _lm_eval_task(
    task: str, loaded: LoadedModel, config: EvalConfig, reference: LoadedModel | None
) -> list[TaskResult]:
    from qtool.evaluation import harness

    shots = config.num_fewshot if isinstance(config.num_fewshot, int) else config.num_fewshot.get(task)
    scores = harness.run(loaded, task, shots, config.limit, config.batch_size, task)
    other: dict[tuple[str, str], Metric] = {}
    if reference is not None:
        floats = harness.run(reference, task, shots, config.limit, config.batch_size, f"{task}, float model")
        other = {(score.task, score.metric): score.measured for score in floats}
    return [
        task_result(
            score.task,
            score.metric,
            score.measured,
            other.get((score.task, score.metric)),
            higher_is_better=score.higher_is_better,
            num_fewshot=score.num_fewshot,
            limit=config.limit,
            detail=score.detail,
            note=score.note,
        )
        for score in scores
    ]
