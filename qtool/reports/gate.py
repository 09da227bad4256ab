"""The quality gate: the measured losses of a model beside the largest ones that its recipe accepts.

The loss is that of the headline (``quality.py``): the relative rise of a perplexity, the relative drop of the mean
accuracy over tasks. The measured value decides, without its standard error. What was asked for and could not be
measured fails.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from qtool.config.gate import GateConfig
from qtool.reports.quality import Judgement, judge, loss
from qtool.reports.records import Number, Record, TaskResult
from qtool.reports.text import metric_name, number, percent
from qtool.reports.verdict import SIGMAS


class GateCheck(Record):
    """A measured loss, and the largest one that passes."""

    key: Literal["max_loss", "max_kl"] = Field(description="Key of the recipe's section gate.")
    measure: str = Field(description="What was measured, e.g. perplexity on wikitext2.")
    value: Number | None = Field(
        description="Loss relative to the float model, or KL divergence in nats per token; null: not measured."
    )
    stderr: Number | None = None
    limit: Number = Field(description="Largest value that passes.")
    passed: bool

    def line(self) -> str:
        """Return the check in one line."""
        limit = f"{100 * self.limit:g} %" if self.key == "max_loss" else f"{self.limit:g} nats"
        if self.value is None:
            return f"{self.measure}: loss not measured, and gate.{self.key} allows {limit}"
        is_share = self.key == "max_loss"
        text = f"loss {percent(self.value, self.stderr)}" if is_share else f"{number(self.value, self.stderr)} nats"
        line = f"{self.measure}: {text}, and gate.{self.key} allows {limit}"
        if self.stderr and abs(self.value - self.limit) <= SIGMAS * self.stderr:
            line += f" (within {SIGMAS} standard errors: other text may decide otherwise)"
        return line


class GateVerdict(Record):
    """Whether the model passed the gate of its recipe, and what was compared."""

    passed: bool
    checks: tuple[GateCheck, ...]

    def line(self) -> str:
        """Return the verdict in one line: every check if all passed, else those that failed."""
        shown = [each.line() for each in self.checks if each.passed == self.passed]
        return f"{'passed' if self.passed else 'failed'}: {'; '.join(shown)}"


def verdict(gate: GateConfig, rows: Sequence[TaskResult]) -> GateVerdict | None:
    """Return the verdict of ``gate`` on measured ``rows``, without members of task groups; ``None`` without limits."""
    if not gate.asked:
        return None
    checks = []
    if gate.max_loss is not None:
        losses = list(_losses(rows)) or [("quality", None)]
        checks += [_check("max_loss", measure, judged, gate.max_loss) for measure, judged in losses]
    if gate.max_kl is not None:
        judged = judge([row for row in rows if row.metric == "kl"])
        checks.append(_check("max_kl", "KL divergence", judged, gate.max_kl))
    return GateVerdict(passed=all(check.passed for check in checks), checks=tuple(checks))


def _check(key: Literal["max_loss", "max_kl"], measure: str, judged: Judgement | None, limit: float) -> GateCheck:
    value, stderr = (None, None) if judged is None else (judged.loss, judged.stderr)
    passed = value is not None and value <= limit
    return GateCheck(key=key, measure=measure, value=value, stderr=stderr, limit=limit, passed=passed)


def _losses(rows: Sequence[TaskResult]) -> Iterator[tuple[str, Judgement | None]]:
    """Yield the name and the loss of each perplexity, of tasks without accuracy, and of the mean of all accuracies.

    The loss of a task is that of its first accuracy, else of its first metric that has a better direction.
    """
    tasks: dict[str, list[TaskResult]] = {}
    for row in rows:
        if row.task != "kl":
            tasks.setdefault(row.task, []).append(row)
    accuracies = []
    for task, own in tasks.items():
        compared = [row for row in own if loss(row) is not None]
        first = next((row for row in compared if row.metric.startswith("acc")), next(iter(compared), None))
        if first is None:
            yield metric_name(task, own[0].metric), None
        elif first.metric.startswith("acc"):
            accuracies.append(first)
        elif (found := loss(first)) is not None:
            yield f"{first.metric} on {task}", Judgement(first.metric, task, *found)
    if accuracies and (judged := judge(accuracies)) is not None:
        yield f"accuracy on {judged.where}", judged
