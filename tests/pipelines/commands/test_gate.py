"""A quality gate of whole commands: exit code 1 after everything is written, and the verdict in every form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.whole_runs import Result

from qtool.reports.report import read_report


@pytest.fixture
def rtn(models: Path) -> dict[str, Any]:
    """A recipe whose loss is measured on generated text, and is large: 2 bits."""
    return {
        "model": {"path": str(models / "llama"), "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"num_bits": 2, "group_size": 32},
        "eval": {"tasks": ["generated", "kl"], "limit": 2, "context": 32, "continuations": 0},
        "export": [{"format": "dense", "path": "out/dense"}],
        "output": {"path": "out/q"},
    }


def test_a_run_that_fails_its_gate_has_written_everything(
    qtool_: Callable[..., Result], recipe: Callable[..., str], rtn: dict[str, Any]
) -> None:
    made = recipe(**rtn)
    failed = qtool_("ptq", made, "--max-kl", "1e-9", "--json")
    assert failed.code == 1
    found = json.loads(failed.out)["report"]["gate"]
    assert not found["passed"]
    (check,) = found["checks"]
    assert (check["key"], check["limit"], check["passed"]) == ("max_kl", 1e-9, False)
    assert check["value"] > 0
    assert "error: the result does not pass its quality gate:\n  KL divergence: " in failed.err
    assert "everything was written to out/q" in failed.err
    assert Path("out/dense/model.safetensors").exists()
    report = read_report(Path("out/q"))
    assert report is not None
    assert report.gate is not None
    assert not report.gate.passed
    for name in ("report.md", "report.html", "README.md"):
        assert "quality gate failed: KL divergence" in Path("out/q", name).read_text()
    # the same run with another gate quantizes and measures nothing again
    passed = qtool_("ptq", made, "--max-kl", "1000", "--json")
    assert passed.code == 0, passed.err
    assert "is complete already" in passed.err
    assert json.loads(passed.out)["report"]["gate"]["passed"]
    assert "quality gate: passed: KL divergence" in Path("out/q/report.md").read_text()
    assert qtool_("ptq", made, "--max-kl", "1e-9").code == 1
    assert qtool_("ptq", made).code == 0
    assert json.loads(Path("out/q/report.json").read_text())["gate"] is None
    assert qtool_("reproduce", "out/q").code == 0


def test_an_evaluation_has_a_gate_too(
    qtool_: Callable[..., Result], recipe: Callable[..., str], rtn: dict[str, Any], models: Path
) -> None:
    assert qtool_("ptq", recipe(**rtn | {"eval": None, "export": []})).code == 0
    options = ("--tasks", "generated,kl", "--limit", "2", "--context", "32")
    assert qtool_("eval", "out/q", *options, "--max-loss", "99%", "--max-kl", "1000").code == 0
    failed = qtool_("eval", "out/q", *options, "--max-kl", "0", "-o", "out/e")
    assert failed.code == 1
    assert "everything was written to out/e" in failed.err
    assert "> **Warning:** quality gate failed" in failed.out
    for folder, also, words in (
        (models / "llama", (), "does not name the one it was made from; name it with --float-model"),
        ("out/q", ("--tasks", "wikitext2"), "gate.max_kl needs the task kl"),
    ):
        refused = qtool_("eval", folder, *options, *also, "--max-kl", "1", "-o", "out/none")
        assert refused.code == 2
        assert words in refused.err
        assert not Path("out/none").exists()


def test_a_gate_without_what_it_needs_is_refused_before_the_run(
    qtool_: Callable[..., Result], recipe: Callable[..., str], rtn: dict[str, Any]
) -> None:
    refused = qtool_("ptq", recipe(**rtn | {"eval": None}), "--max-loss", "2%")
    assert refused.code == 2
    assert "gate.max_loss needs a perplexity or a task of lm-eval, and the recipe has no section eval" in refused.err
    assert not Path("out").exists()


def test_a_sweep_has_no_gate(qtool_: Callable[..., Result], recipe: Callable[..., str], rtn: dict[str, Any]) -> None:
    made = recipe(**rtn | {"export": [], "gate": {"max_kl": 1.0}})
    Path("sweep.yaml").write_text(f"recipe: {made}\ngrid: {{seed: [0, 1]}}\noutput: out/s\n")
    refused = qtool_("sweep", "sweep.yaml")
    assert refused.code == 2
    assert "gate: a sweep shows every cell, whatever its loss; remove this section" in refused.err
