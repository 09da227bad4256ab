"""A call into lm-eval is quiet: what it would print by itself is passed on as notes or not made."""

import subprocess

import lm_eval.evaluator
import pytest

from qtool.evaluation import harness


def test_lm_eval_runs_no_git_whose_error_would_break_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keys: object) -> bytes:
        raise AssertionError("git was called")

    monkeypatch.setattr(subprocess, "check_output", refuse)
    with harness._harness():
        assert lm_eval.evaluator.get_git_commit_hash() is None
