"""The quality of a quantized model: the result it is judged by, and warnings of evaluation on calibration text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from qtool.reports.records import OVERLAP_TOKENS, OVERLAP_WARNING, Series, TaskResult, change_error
from qtool.reports.text import number, percent
from qtool.reports.verdict import relative_loss, words

ACCURACIES = "acc", "exact_match"  # what the names of metrics begin with that are a share of right answers


class Judgement(NamedTuple):
    """The result that quality is judged by."""

    metric: str  # perplexity, KL divergence or accuracy
    where: str  # text or tasks; empty for KL divergence
    loss: float  # relative to the float model; KL divergence in nats
    stderr: float | None

    @property
    def change(self) -> str:
        """The change against the float model, as a number with its standard error."""
        return _change(self.metric == "KL divergence", self.metric == "accuracy", self.loss, self.stderr)

    @property
    def words(self) -> str:
        """The name of the loss, by ``verdict.RULE``."""
        return words(self.loss, self.stderr)

    def __str__(self) -> str:
        """The metric, its change, where it was measured, and the words."""
        return f"{self.metric} {self.change}{f' on {self.where}' if self.where else ''}: {self.words}"


def judgements(rows: Sequence[TaskResult]) -> list[Judgement]:
    """Return what the results ``rows`` say of quality: the judgement by text, and that by the accuracy on tasks."""
    return [judged for judged in (_on_text(rows), _mean_accuracy(rows)) if judged is not None]


def judge(rows: Sequence[TaskResult]) -> Judgement | None:
    """Return the first of ``judgements``; ``None`` if no row was compared with a float model."""
    return next(iter(judgements(rows)), None)


def _on_text(rows: Sequence[TaskResult]) -> Judgement | None:
    """Return the judgement by perplexity, preferably on real text (not generated) that is not in the calibration text.

    Without perplexity it is that by KL divergence.
    """
    rows = [row for row in rows if loss(row) is not None]
    rows.sort(key=lambda row: ((row.overlap or 0) >= OVERLAP_WARNING, row.task == "generated"))
    for metric in ("perplexity", "kl"):
        for row in rows:
            if row.metric == metric and (found := loss(row)):
                return Judgement(metric, row.task, *found) if metric != "kl" else Judgement("KL divergence", "", *found)
    return None


def _mean_accuracy(rows: Sequence[TaskResult]) -> Judgement | None:
    """Return the judgement by the mean accuracy over tasks; a group counts once, and its members do not count again."""
    members = {row.task for row in rows if row.detail}
    tasks: dict[str, TaskResult] = {}
    for row in rows:
        if row.metric.startswith(ACCURACIES) and row.task not in members and loss(row) is not None:
            tasks.setdefault(row.task, row)
    if not tasks:
        return None
    count = len(tasks)
    value, reference = (sum(getattr(row, side) for row in tasks.values()) for side in ("value", "float_value"))
    errors = [error for row in tasks.values() if (error := change_error(row)) is not None]
    stderr = math.hypot(*errors) / abs(reference) if len(errors) == count else None
    where = next(iter(tasks)) if count == 1 else f"{count} tasks"
    return Judgement("accuracy", where, relative_loss(value, reference, higher_is_better=True), stderr)


def loss(row: TaskResult) -> tuple[float, float | None] | None:
    """Return the loss of a row relative to the float model, and its standard error; ``None`` if not compared."""
    if row.value is None:
        return None
    if row.metric == "kl":
        return row.value, row.stderr
    if not row.float_value or row.higher_is_better is None:
        return None
    error = change_error(row)
    return (
        relative_loss(row.value, row.float_value, row.higher_is_better),
        None if error is None else error / abs(row.float_value),
    )


def change(row: TaskResult) -> str:
    """Return the change of a row relative to the float model as text; empty if it was not compared."""
    found = loss(row)
    return "" if found is None else _change(row.metric == "kl", bool(row.higher_is_better), *found)


def _change(is_divergence: bool, higher_is_better: bool, loss: float, stderr: float | None) -> str:
    """Return a loss as the change of its metric in percent; of KL divergence the divergence in nats."""
    if is_divergence:
        return f"{number(loss, stderr)} nats"
    return percent(0.0 - loss if higher_is_better else loss, stderr)


def overlaps(rows: Sequence[TaskResult]) -> dict[str, float]:
    """Return the fraction of each evaluated text that occurs in the calibration text, once for each text."""
    shares: dict[str, float] = {}
    for row in rows:
        if row.overlap is not None and row.overlap not in shares.values():
            shares.setdefault(row.task, row.overlap)
    return shares


def warnings(rows: Sequence[TaskResult], source: str) -> list[str]:
    """Return a warning for each evaluated text of which too much occurs in the calibration text ``source``."""
    return [
        f"{share:.1%} of the text of {task} (in sequences of {OVERLAP_TOKENS} tokens) also occurs in the calibration "
        "text"
        f"{f', {source}' if source else ''}: results on it partly measure memorization."
        for task, share in overlaps(rows).items()
        if share >= OVERLAP_WARNING
    ]


def unimproved(series: Sequence[Series]) -> list[str]:
    """Return a warning for each training of the whole model whose best validated state was its start."""
    return [
        f"no state of the training had a lower validation {each.name} than its start ({each.values[0]:.4g}); the start "
        "was kept, so the training changed nothing. More calibration text, or a lower travel or learning rate, may "
        "help."
        for each in series
        if each.per == "validation" and len(each.values) > 1 and min(each.values) == each.values[0]
    ]
