"""The quality gate: which losses it compares, and when it passes."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.config.gate import GateConfig
from qtool.config.recipe import EvalRecipe, check
from qtool.reports.gate import GateVerdict, verdict
from qtool.reports.records import Metric, TaskResult, task_result
from qtool.system.errors import InputError


def row(task: str, metric: str, value: float | None, reference: float | None, **fields: Any) -> TaskResult:
    if value is None:
        return TaskResult(task=task, metric=metric, value=None, note="not measured: no data")
    other = None if reference is None else Metric(value=reference, stderr=0.01, n=10)
    known = {"higher_is_better": metric not in ("perplexity", "kl")} | fields
    return task_result(task, metric, Metric(value=value, stderr=0.01, n=10), other, **known)


def passes(rows: list[TaskResult], **limits: float) -> GateVerdict:
    found = verdict(GateConfig.model_validate(limits), rows)
    assert found is not None
    return found


@given(st.floats(1, 100), st.floats(-0.5, 2), st.floats(0, 0.99))
def test_a_perplexity_passes_exactly_if_its_relative_rise_is_within_the_limit(
    reference: float, rise: float, limit: float
) -> None:
    value = reference * (1 + rise)
    found = passes([row("wikitext2", "perplexity", value, reference)], max_loss=limit)
    assert found.passed == ((value - reference) / reference <= limit)
    assert found.checks[0].value == pytest.approx(rise, abs=1e-9)


def test_every_perplexity_counts_and_accuracies_by_their_mean() -> None:
    rows = [
        row("wikitext2", "perplexity", 10.1, 10.0),
        row("c4", "perplexity", 10.5, 10.0),
        row("boolq", "acc", 0.40, 0.50),
        row("piqa", "acc", 0.60, 0.50),
        row("piqa", "acc_norm", 0.10, 0.50),
        row("gsm8k", "exact_match (strict-match)", 0.27, 0.30),
        row("kl", "kl", 9.0, None),
    ]
    found = passes(rows, max_loss=0.02)
    assert not found.passed
    assert {check.measure: check.passed for check in found.checks} == {
        "perplexity on wikitext2": True,
        "perplexity on c4": False,
        "exact_match (strict-match) on gsm8k": False,
        "accuracy on 2 tasks": True,
    }
    assert [check.value for check in found.checks] == pytest.approx([0.01, 0.05, 0.1, 0.0])
    assert "c4: loss +5.0 % ± 0.1 %, and gate.max_loss allows 2 %" in found.line()
    assert "wikitext2" not in found.line(), "only what failed is listed"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("wikitext2", "perplexity", None, None)],
        [row("wikitext2", "perplexity", 10.0, None)],
        [row("wikitext2", "perplexity", math.nan, 10.0)],
        [row("wikitext2", "perplexity", math.inf, 10.0)],
        [row("wikitext2", "perplexity", 10.0, 10.0), row("c4", "perplexity", None, None)],
    ],
)
def test_what_was_not_measured_or_is_no_number_fails(rows: list[TaskResult]) -> None:
    assert not passes(rows, max_loss=0.5).passed


def test_divergence_has_a_limit_of_its_own_and_the_message_says_when_it_is_close() -> None:
    rows = [row("kl", "kl", 0.05, None), row("kl", "99th percentile", 7.0, None)]
    assert passes(rows, max_kl=0.05).passed
    found = passes(rows, max_kl=0.04)
    assert not found.passed
    assert found.line().startswith(
        "failed: KL divergence: 0.050 ± 0.010 nats, and gate.max_kl allows 0.04 nats (within 2"
    )
    assert not passes([], max_kl=0.04).passed
    assert verdict(GateConfig(), rows) is None


@pytest.mark.parametrize(("written", "limit"), [("2%", 0.02), ("0.5 %", 0.005), (0.02, 0.02), ("0.02", 0.02), (0, 0.0)])
def test_a_limit_is_a_percentage_or_a_fraction(written: object, limit: float) -> None:
    found = GateConfig.model_validate({"max_loss": written})
    assert found.max_loss == pytest.approx(limit)
    assert GateConfig.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"max_loss": 2}, "should be a percentage such as 2%, or a fraction below 1 such as 0.02; found 2"),
        ({"max_loss": "two"}, "should be a percentage such as 2%, or a fraction such as 0.02"),
        ({"max_loss": "200%"}, "gate.max_loss"),
        ({"max_loss": -0.1}, "gate.max_loss"),
        ({"max_loss": True}, "gate.max_loss"),
        ({"max_kl": -1}, "gate.max_kl"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(gate: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check(EvalRecipe, {"model": {"path": "m"}, "gate": gate}, "x")
    assert words in str(caught.value)


def test_a_limit_of_divergence_needs_its_task_which_is_there_by_default() -> None:
    asked = {"model": {"path": "m"}, "gate": {"max_kl": 1}}
    with pytest.raises(
        InputError, match=r"gate\.max_kl needs the task kl, and eval\.tasks has wikitext2; add kl to eval\.tasks"
    ):
        check(EvalRecipe, asked | {"eval": {"tasks": ["wikitext2"]}}, "x")
    check(EvalRecipe, asked, "x")


def test_a_loss_needs_more_than_the_divergence() -> None:
    asked = {"model": {"path": "m"}, "eval": {"tasks": ["kl"]}}
    with pytest.raises(InputError, match=r"max_loss needs a perplexity or a task of lm-eval, and eval\.tasks has kl"):
        check(EvalRecipe, asked | {"gate": {"max_loss": "2%"}}, "x")
    check(EvalRecipe, asked | {"gate": {"max_kl": 0.1}}, "x")
