"""The section ``gate`` of a recipe: the largest loss of quality with which a run or an evaluation passes."""

import math
from typing import Annotated

from pydantic import BeforeValidator, Field

from qtool.config.section import Section
from qtool.config.sections import EvalConfig


def _share(value: object) -> object:
    """Return ``2%`` as 0.02; refuse other numbers from 1, which are most likely percent."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        number = float(text.removesuffix("%")) if text else value
    except ValueError:
        raise ValueError("should be a percentage such as 2%, or a fraction such as 0.02") from None
    if text.endswith("%") and isinstance(number, float):
        return number / 100
    if isinstance(number, int | float) and not isinstance(number, bool) and 1 <= number < math.inf:
        raise ValueError(f"should be a percentage such as {number:g}%, or a fraction below 1 such as 0.02")
    return number


class GateConfig(Section):
    """The largest loss of quality that is accepted; a command whose result has a larger one ends with exit code 1."""

    max_loss: Annotated[float, BeforeValidator(_share), Field(ge=0, lt=1)] | None = Field(
        None,
        description="Largest loss against the float model, e.g. 2%: the relative rise of each perplexity, and the "
        "relative drop of the mean accuracy over all tasks. A larger loss, or one that could not be measured, ends the "
        "command with exit code 1, after everything is written.",
    )
    max_kl: float | None = Field(
        None,
        ge=0,
        description="Largest mean KL divergence from the float model, in nats per token, e.g. 0.05; needs the task kl. "
        "Exit code as for max_loss.",
    )

    @property
    def asked(self) -> bool:
        """True if there is a limit."""
        return self.max_loss is not None or self.max_kl is not None

    def check(self, evaluation: EvalConfig | None) -> None:
        """Refuse a limit of what ``evaluation`` does not measure.

        Raises:
            ValueError: the message says what is missing, and which key adds it.
        """
        tasks = () if evaluation is None else evaluation.tasks
        if self.max_kl is not None and "kl" not in tasks:
            raise ValueError(f"gate.max_kl needs the task kl, and {_measured(tasks)}; add kl to eval.tasks")
        if self.max_loss is not None and not set(tasks) - {"kl"}:
            raise ValueError(
                f"gate.max_loss needs a perplexity or a task of lm-eval, and {_measured(tasks)}; add wikitext2 to "
                "eval.tasks"
            )


def _measured(tasks: tuple[str, ...]) -> str:
    return f"eval.tasks has {', '.join(tasks)}" if tasks else "the recipe has no section eval"
