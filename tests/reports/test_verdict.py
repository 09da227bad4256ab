"""The class of a loss (``negligible`` and so on): given only if the whole interval lies in the class."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.reports.records import Metric, TaskResult, task_result
from qtool.reports.report import Report
from qtool.reports.verdict import CLASSES, RULE, SIGMAS, relative_loss, words

LIMITS = [limit for limit, _ in CLASSES]
WORDS = [text for _, text in CLASSES]
losses = st.floats(-2, 2)
errors = st.floats(0, 1)


def class_of(loss: float) -> int:
    return sum(loss > limit for limit in LIMITS)


@given(losses, errors)
def test_the_words_are_those_of_both_ends_of_the_interval(loss: float, stderr: float) -> None:
    low, high = class_of(loss - SIGMAS * stderr), class_of(loss + SIGMAS * stderr)
    said = words(loss, stderr)
    if low == high:
        assert said == WORDS[low]
    else:
        assert said.startswith(f"between {WORDS[low]} and {WORDS[high]}")
        assert "too few" in said


@pytest.mark.parametrize("index", range(len(CLASSES) - 1))
def test_a_limit_belongs_to_the_class_below_it(index: int) -> None:
    limit = LIMITS[index]
    assert words(limit, 0.0) == WORDS[index]
    assert words(math.nextafter(limit, 1), 0.0) == WORDS[index + 1]


@given(losses, losses, errors)
def test_a_larger_loss_never_sounds_better(a: float, b: float, stderr: float) -> None:
    def ends(said: str) -> list[int]:
        return sorted(WORDS.index(text) for text in WORDS if text in said)

    less, more = ends(words(min(a, b), stderr)), ends(words(max(a, b), stderr))
    assert less[0] <= more[0]
    assert less[-1] <= more[-1]


@given(st.floats(-0.5, 0.5), st.floats(0.011, 5))
def test_a_test_that_is_too_small_never_says_nearly_lossless(loss: float, stderr: float) -> None:
    assert words(loss, stderr) != "nearly lossless"


def test_what_is_not_a_number_is_said() -> None:
    assert words(math.nan, 0.1) == words(math.inf, None) == "broken (not a finite number)"
    assert words(0.0, math.nan).startswith("undecided")
    assert words(0.0, None) == "nearly lossless (if its standard error, which is unknown, is small)"


@given(st.floats(0.1, 1e3), st.floats(0.1, 1e3))
def test_loss_is_what_is_worse_as_a_share_of_the_float_number(value: float, reference: float) -> None:
    assert relative_loss(value, reference, False) == pytest.approx(value / reference - 1)
    assert relative_loss(value, reference, True) == pytest.approx(1 - value / reference)
    assert math.isnan(relative_loss(value, 0.0, True))


def test_the_rule_names_every_limit_and_every_class() -> None:
    for limit in LIMITS[:-1]:
        assert f"{abs(limit):.0%}" in RULE
    for text in WORDS:
        assert text in RULE
    assert f"{SIGMAS} standard errors" in RULE


def row(task: str, metric: str, value: float, reference: float | None, error: float, better: bool) -> TaskResult:
    other = None if reference is None else Metric(value=reference, stderr=error, n=9)
    fields = {"higher_is_better": better} | ({"delta_stderr": error} if metric == "perplexity" and other else {})
    return task_result(task, metric, Metric(value=value, stderr=error, n=9), other, **fields)


REAL = row("wikitext2", "perplexity", 10.3, 10.0, 0.02, False)
OWN = row("generated", "perplexity", 12.0, 10.0, 0.02, False)
KL = row("kl", "kl", 0.1, None, 0.001, False)
BOOLQ, PIQA = (row(task, "acc", 0.601, 0.64, 0.003, True) for task in ("boolq", "piqa"))
BAD = row("mmlu_stem", "acc", 0.1, 0.64, 0.003, True)
MEMBER = BAD.model_copy(update={"detail": True})
GSM8K = row("gsm8k", "exact_match (strict-match)", 0.601, 0.64, 0.003, True)
PAIRED = BOOLQ.model_copy(update={"delta_stderr": 0.0005})
EQUAL = row("boolq", "acc", 0.64, 0.64, 0.003, True)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((OWN, KL, REAL), "perplexity +3.0 % ± 0.2 % on wikitext2: a small loss"),
        ((KL, OWN), "perplexity +20.0 % ± 0.2 % on generated: between a clear loss and a large loss"),
        (
            (BOOLQ, KL),
            "KL divergence 0.1000 ± 0.0010 nats: a clear loss; accuracy -6.1 % ± 0.7 % on boolq: between a small loss",
        ),
        ((BOOLQ,), "accuracy -6.1 % ± 0.7 % on boolq: between a small loss and a clear loss"),
        ((BOOLQ, PIQA), "accuracy -6.1 % ± 0.5 % on 2 tasks: a clear loss"),
        # a group of tasks counts once, and its members do not, even where a member was asked for by itself
        ((BOOLQ, PIQA, MEMBER), "accuracy -6.1 % ± 0.5 % on 2 tasks"),
        ((BOOLQ, PIQA, MEMBER, BAD), "accuracy -6.1 % ± 0.5 % on 2 tasks"),
        ((BOOLQ, GSM8K), "accuracy -6.1 % ± 0.5 % on 2 tasks"),
        ((PAIRED,), "accuracy -6.09 % ± 0.08 % on boolq: a clear loss"),
        ((EQUAL,), "accuracy +0.0 % ± 0.7 % on boolq"),
        (
            (row("t", "perplexity", 9.0, None, 0.1, False),),
            "perplexity 9.00 ± 0.10 on t; not compared with a float model",
        ),
        ((TaskResult(task="t", metric="m", value=None),), "quality was not measured"),
        ((), "quality was not measured"),
        ((row("t", "perplexity", math.inf, 10.0, math.nan, False),), "broken"),
    ],
)
def test_the_headline_judges_by_what_says_most(rows: tuple[TaskResult, ...], expected: str) -> None:
    sizes = {"bits_per_weight": 4.25, "float_bytes": 300, "quantized_bytes": 100}
    said = Report(model="m", results=rows, **sizes).headline()
    assert said.startswith("4.25 bits per weight, 3.0 x smaller, ")
    assert expected in said


def test_text_that_calibration_held_is_the_last_to_judge_by() -> None:
    seen = REAL.model_copy(update={"overlap": 0.9})
    assert "on generated" in Report(model="m", results=(seen, OWN)).headline()
    assert "on wikitext2" in Report(model="m", results=(seen,)).headline()


def test_a_larger_result_is_not_called_smaller() -> None:
    assert "2.0 x larger" in Report(model="m", float_bytes=100, quantized_bytes=200).headline()
