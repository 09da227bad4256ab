"""Overlap of evaluated text with calibration text: its measure, and the warnings about it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qtool.config.recipe import Recipe
from qtool.config.sections import EvalConfig, ModelConfig
from qtool.data.windows import perplexity_windows
from qtool.evaluation import contamination
from qtool.evaluation.contamination import relation
from qtool.pipelines import evaluate, quantize
from qtool.reports.records import OVERLAP_TOKENS, OVERLAP_WARNING, CalibrationText, Metric, TaskResult, task_result
from qtool.reports.report import Report


def windows(num: int, length: int, seed: int, vocabulary: int = 4096) -> torch.Tensor:
    return torch.randint(vocabulary, (num, length), generator=torch.Generator().manual_seed(seed))


def plainly(calibration: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Compute the overlap directly from its definition."""

    def runs(tokens: torch.Tensor) -> list[tuple[int, ...]]:
        return [
            tuple(row[i : i + OVERLAP_TOKENS]) for row in tokens.tolist() for i in range(len(row) - OVERLAP_TOKENS + 1)
        ]

    known = set(runs(calibration))
    wanted = runs(evaluation)
    return sum(each in known for each in wanted) / len(wanted)


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.integers(OVERLAP_TOKENS, 40)),
    vocabulary=st.sampled_from([1, 2, 4096]),
    copied=st.integers(0, 40),
    chunk=st.sampled_from([1, 30, 1 << 20]),
)
def test_it_is_the_share_of_runs_that_occur(
    sizes: tuple[int, int, int, int], vocabulary: int, copied: int, chunk: int
) -> None:
    n, t, m, s = sizes
    calibration, evaluation = windows(n, t, 0, vocabulary), windows(m, s, 1, vocabulary)
    copied = min(copied, t, s)
    calibration[-1, t - copied :] = evaluation[0, :copied]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "CHUNK", chunk)
        assert contamination.overlap(calibration, evaluation) == pytest.approx(plainly(calibration, evaluation))


def test_limits() -> None:
    tokens = windows(4, 64, 0)
    assert contamination.overlap(tokens, tokens) == 1
    assert contamination.overlap(tokens[:1], tokens) == 0.25
    assert contamination.overlap(tokens, windows(4, 64, 1)) == 0
    assert contamination.overlap(tokens, tokens.flip(1)) == 0
    assert contamination.overlap(tokens, tokens[:, : OVERLAP_TOKENS - 1]) is None
    assert contamination.overlap(tokens[:, : OVERLAP_TOKENS - 1], tokens) == 0


def test_runs_end_with_their_window() -> None:
    tokens = windows(2, 20, 0)
    joined = torch.cat([tokens[0, 10:], tokens[1, :10]])[None]
    assert contamination.overlap(tokens, joined) == 0


@pytest.mark.parametrize(
    ("source", "task", "words"),
    [
        ("wikitext2", "wikitext2", "same distribution"),
        ("wikitext2", "wikitext", "same distribution"),
        ("generated", "generated", "same distribution"),
        ("enwiki", "wikitext2", "Wikipedia too"),
        ("c4", "wikitext2", ""),
        ("wikitext2", "boolq", ""),
    ],
)
def test_the_same_distribution_is_a_note_whatever_the_overlap(source: str, task: str, words: str) -> None:
    assert words in relation(source, task)
    assert bool(words) == bool(relation(source, task))


# ------------------------------------------------------------------------------------------------ the report


def row(task: str, metric: str, share: float | None) -> TaskResult:
    return task_result(task, metric, Metric(value=3.0, stderr=0.1, n=10), None, overlap=share)


def report(*rows: TaskResult) -> Report:
    text = CalibrationText(source="a.jsonl", num_samples=8, seq_len=32)
    return Report(model="m", quantized="q", calibration=text, results=rows)


def rendered(of: Report) -> str:
    file = io.StringIO()
    of.render(Console(file=file, width=80, force_terminal=False))
    return " ".join(file.getvalue().split())


def test_an_overlap_above_the_alarm_is_a_warning_in_every_form() -> None:
    leaking = report(row("wikitext2", "perplexity", 0.25), row("kl", "kl", 0.25), row("generated", "perplexity", 1e-4))
    text = "25.0% of the text of wikitext2 (in sequences of 13 tokens) also occurs in the calibration text, a.jsonl"
    assert leaking.markdown().count(f"> **Warning:** {text}") == 1
    assert f"warning: {text}" in rendered(leaking)
    assert [each["overlap"] for each in leaking.model_dump(mode="json")["results"]] == [0.25, 0.25, 1e-4]
    for words in (leaking.markdown(), rendered(leaking)):
        assert "already in the calibration text: 0.25 of wikitext2, 0.0001 of generated" in words
        assert "calibrated on: a.jsonl, 8 windows of 32 tokens" in words


def test_below_the_alarm_there_is_a_number_and_no_warning() -> None:
    fair = report(row("wikitext2", "perplexity", 0.99 * OVERLAP_WARNING))
    assert not fair.warnings()
    assert "arning" not in fair.markdown() + rendered(fair)
    assert "already in the calibration text: 0.0099 of wikitext2" in fair.markdown()
    assert "already" not in report(row("wikitext2", "perplexity", None)).markdown()


# --------------------------------------------------------------------------------------------------- in a run


def recipe(folder: Path, out: Path, **changes: Any) -> Recipe:
    raw = {
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
        "method": {"name": "gptq"},
        "quant": {"group_size": 32},
        "eval": {"tasks": ["generated", "kl"], "limit": 4, "context": 48},
        "output": {"path": str(out)},
    }
    return Recipe.model_validate(raw | changes)


def report_of(asked: Recipe) -> Report:
    """Quantize as a single process, which always has an outcome, and return its report."""
    outcome = quantize.quantize(asked)
    assert outcome is not None
    return outcome.report


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.data import hub

    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


@pytest.mark.usefixtures("no_data")
def test_calibration_on_the_evaluated_text_is_told(llama_folder: Path, tmp_path: Path) -> None:
    floats = tiny.load(llama_folder)
    same = perplexity_windows("generated", floats, 48, 4, seed=0)
    np.save(tmp_path / "same.npy", torch.cat([same[:2], same[:2].flip(1)]).numpy())
    text = {"source": str(tmp_path / "same.npy"), "num_samples": 4, "seq_len": 48}
    found = report_of(recipe(llama_folder, tmp_path / "q", data=text))
    assert {each.overlap for each in found.results} == {0.5}  # of each metric on the task
    assert len(found.warnings()) == 1
    for name in ("report.md", "README.md"):
        assert "> **Warning:** 50.0% of the text of generated" in (tmp_path / "q" / name).read_text()
    assert json.loads((tmp_path / "q/report.json").read_text())["results"][0]["overlap"] == 0.5

    model = ModelConfig(path=str(tmp_path / "q"), dtype="float32", device="cpu")
    config = EvalConfig(tasks=("generated",), limit=4, context=48)
    again = evaluate.evaluate(model, config).report
    assert again.results[0].overlap == 0.5
    assert again.calibration == found.calibration
    np.save(tmp_path / "same.npy", same.numpy())  # no longer the text that calibrated the model
    assert evaluate.evaluate(model, config).report.results[0].overlap is None


@pytest.mark.usefixtures("no_data")
def test_text_that_the_model_wrote_twice_is_the_same_distribution_and_hardly_the_same_text(
    llama_folder: Path, tmp_path: Path
) -> None:
    found = report_of(recipe(llama_folder, tmp_path / "q", data={"num_samples": 4, "seq_len": 48}))
    assert found.results[0].overlap is not None
    assert found.results[0].overlap < OVERLAP_WARNING
    assert found.results[0].note.endswith("same distribution, other text")
    assert "same distribution" not in found.results[1].note
    config = EvalConfig(tasks=("generated",), limit=4, context=48)
    model = ModelConfig(path=str(tmp_path / "q"), dtype="float32", device="cpu")
    alone = evaluate.evaluate(model, config).report
    assert alone.results[0].overlap is None  # the generated text is not kept
    assert alone.results[0].note.endswith("same distribution, other text")


@pytest.mark.usefixtures("no_data")
def test_a_method_without_data_has_seen_nothing(llama_folder: Path, tmp_path: Path) -> None:
    found = report_of(recipe(llama_folder, tmp_path / "q", method={"name": "rtn"}))
    assert found.calibration is None
    assert {each.overlap for each in found.results} == {None}
    assert "distribution" not in found.markdown()
