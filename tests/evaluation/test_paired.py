"""Errors of changes of accuracies, from the answers of two models to the same items."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.evaluation.paired import Answers, answers, change_error


def answered(*scores: float, items: str = "item") -> Answers:
    return Answers(tuple(f"{items} {i}" for i in range(len(scores))), np.array(scores, np.float64))


def error_of(a: Answers, b: Answers) -> float | None:
    return change_error([a], [b], float(a.scores.mean()), float(b.scores.mean()))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_the_error_is_that_of_a_table_with_half_an_observation_in_each_cell(pairs: list[tuple[int, int]]) -> None:
    cells = {(a, b): pairs.count((a, b)) + 0.5 for a in (0, 1) for b in (0, 1)}
    total = sum(cells.values())
    gained, lost = cells[1, 0] / total, cells[0, 1] / total
    ours, theirs = (answered(*side) for side in zip(*pairs, strict=True))
    assert error_of(ours, theirs) == pytest.approx(math.sqrt((gained + lost - (gained - lost) ** 2) / total))


def test_few_equal_answers_do_not_make_a_change_certain() -> None:
    four, many = answered(*[1.0, 0.0] * 2), answered(*[1.0, 0.0] * 1000)
    assert error_of(four, four) == pytest.approx(1 / 6)
    assert error_of(many, many) == pytest.approx(1 / 2002)


def test_of_many_items_it_is_the_error_of_the_mean_difference_and_covers_the_truth() -> None:
    drawn = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        theirs = drawn.random(2000) < 0.6
        flipped = drawn.random(2000) < 0.05
        ours = np.where(flipped, drawn.random(2000) < 0.3, theirs)  # right answers are lost more often than gained
        a, b = answered(*ours.astype(float)), answered(*theirs.astype(float))
        error = error_of(a, b)
        assert error is not None
        assert error == pytest.approx((a.scores - b.scores).std(ddof=1) / math.sqrt(2000), rel=0.02)
        covered += abs(float((a.scores - b.scores).mean()) + 0.05 * (0.6 - 0.3)) < 2 * error
    assert covered / 300 == pytest.approx(0.954, abs=0.03)


def test_a_group_is_the_mean_over_items_or_over_tasks() -> None:
    drawn = np.random.default_rng(1)
    ours, theirs = ([answered(*drawn.integers(0, 2, n).astype(float)) for n in (5, 40)] for _ in range(2))
    joined = [answered(*np.concatenate([each.scores for each in side])) for side in (ours, theirs)]
    means = [float(each.scores.mean()) for each in joined]
    assert change_error(ours, theirs, *means) == pytest.approx(error_of(*joined))
    single = [error_of(a, b) or math.nan for a, b in zip(ours, theirs, strict=True)]
    means = [float(np.mean([each.scores.mean() for each in side])) for side in (ours, theirs)]
    assert change_error(ours, theirs, *means) == pytest.approx(math.hypot(*single) / 2)


def test_scores_beyond_0_and_1_have_the_plain_error() -> None:
    ours, theirs = answered(3.0, 5.0, 10.0), answered(1.0, 2.0, 4.0)
    assert error_of(ours, theirs) == pytest.approx(np.std([2, 3, 6], ddof=1) / math.sqrt(3))
    assert error_of(answered(3.0), answered(1.0)) is None


def test_it_is_unknown_of_what_is_no_mean_and_of_other_items() -> None:
    ours, theirs = answered(1.0, 0.0, 1.0), answered(1.0, 1.0, 0.0)
    assert error_of(ours, theirs) is not None
    assert change_error([ours], [theirs], 0.8, float(theirs.scores.mean())) is None, "such as F1"
    assert error_of(ours, answered(1.0, 1.0, 0.0, items="other")) is None
    assert change_error([ours, None], [theirs, None], 2 / 3, 2 / 3) is None
    assert change_error([], [], 0.0, 0.0) is None


def test_answers_are_those_of_one_filter_and_are_numbers() -> None:
    samples = [
        {"filter": "none", "doc_hash": "a", "acc": True, "ppl": (-3.0, 2)},
        {"filter": "none", "doc_hash": "b", "acc": np.float64(0.5), "ppl": (-1.0, 1)},
        {"filter": "strict", "doc_hash": "c", "acc": 0},
    ]
    found = answers(samples, "acc", "none")
    assert found is not None
    assert found.items == ("a", "b")
    assert found.scores.tolist() == [1.0, 0.5]
    assert answers(samples, "ppl", "none") is None
    assert answers(samples, "acc", "other") is None
