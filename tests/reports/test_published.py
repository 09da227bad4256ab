"""Published numbers: their section of a recipe, and how reports show them beside ours."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from qtool.cli import main
from qtool.config import recipe
from qtool.config.sections import ExpectedConfig
from qtool.reports.records import Metric, TaskResult, beside_published, task_result
from qtool.reports.report import Report
from qtool.system.errors import InputError

PAPER = "arXiv 2407.11062"
FIVE = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")


def published(*tasks: str, metric: str = "acc", value: float = 0.6) -> ExpectedConfig:
    return ExpectedConfig(tasks=tasks, metric=metric, value=value, source=PAPER)


def row(task: str, metric: str, value: float, stderr: float | None = None, **fields: Any) -> TaskResult:
    return task_result(task, metric, Metric(value=value, stderr=stderr, n=10), None, **fields)


def report(*expected: ExpectedConfig, results: tuple[TaskResult, ...] = ()) -> Report:
    return Report(model="m", results=results, expected=beside_published(expected, results))


def rendered(of: Report) -> str:
    file = io.StringIO()
    of.render(Console(file=file, width=80, force_terminal=False))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    return file.getvalue()


def test_the_difference_is_ours_minus_theirs() -> None:
    (found,) = beside_published(
        [published("wikitext2", metric="perplexity", value=6.5)], [row("wikitext2", "perplexity", 7.0, 0.1)]
    )
    assert (found.task, found.measured, found.stderr, found.difference, found.note) == ("wikitext2", 7.0, 0.1, 0.5, "")


def test_of_several_tasks_it_is_the_mean_and_its_standard_error() -> None:
    rows = [row("piqa", "acc", 0.5, 0.03), row("piqa", "acc_norm", 0.9, 0.5), row("arc_easy", "acc", 0.7, 0.04)]
    (found,) = beside_published([published("piqa", "arc_easy", value=0.5)], rows)
    assert found.task == "mean of piqa, arc_easy"
    assert found.measured == pytest.approx(0.6)
    assert found.stderr == pytest.approx(0.025)
    assert found.difference == pytest.approx(0.1)
    (found,) = beside_published([published("piqa", "arc_easy")], [*rows[:2], row("arc_easy", "acc", 0.7)])
    assert found.stderr is None


def test_acc_norm_is_acc_for_a_task_that_has_no_other() -> None:
    rows = [row("piqa", "acc", 0.5), row("piqa", "acc_norm", 0.7), row("boolq", "acc", 0.9)]
    (found,) = beside_published([published("piqa", "boolq", metric="acc_norm", value=0.8)], rows)
    assert found.difference == pytest.approx(0)
    (found,) = beside_published([published("piqa", "boolq", metric="acc", value=0.7)], rows)
    assert found.difference == pytest.approx(0)


def test_a_limit_is_told_for_the_paper_had_none() -> None:
    (found,) = beside_published([published("piqa")], [row("piqa", "acc", 0.5, limit=10)])
    assert found.note == "limit 10"


@pytest.mark.parametrize(
    ("results", "note"),
    [
        ((), "not measured: piqa was not evaluated"),
        ((row("piqa", "acc_norm", 0.5),), "not measured: piqa has acc_norm here"),
        ((TaskResult(task="piqa", metric="acc", value=None, note="not measured: no data"),), "not measured: no data"),
    ],
)
def test_what_was_not_measured_says_why(results: tuple[TaskResult, ...], note: str) -> None:
    (found,) = beside_published([published("piqa")], results)
    assert (found.measured, found.difference, found.note) == (None, None, note)


def test_a_report_has_ours_beside_theirs_in_every_form(tmp_path: Path) -> None:
    made = report(
        published("wikitext2", metric="perplexity", value=6.86),
        published(*FIVE, value=0.6014),
        results=(row("wikitext2", "perplexity", 7.0123, 0.0234),),
    )
    lines = made.markdown().splitlines()
    assert "| task | metric | published | ours | difference | source |" in lines
    assert f"| wikitext2 | perplexity | 6.86 | 7.012 ± 0.023 | +0.1523 | {PAPER} |" in lines
    assert f"| mean of {', '.join(FIVE)} | acc | 0.6014 | not measured |  | {PAPER}; not measured:" in made.markdown()
    words = rendered(made)
    for part in ("published", "6.86", "7.012 ± 0.023", "+0.1523", "0.6014", *PAPER.split()):  # texts wrap
        assert part in words
    made.write(tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert Report.model_validate_json(text) == made
    assert json.loads(text)["expected"][0]["difference"] == pytest.approx(0.1523)
    assert "published" not in report().markdown() + rendered(report())


# ---------------------------------------------------------------------------------------------- in a recipe


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("{tasks: [wikitext2], metric: ppl, value: 6, source: x}", "wikitext2 has no metric 'ppl'; it has perplexity"),
        (
            "{tasks: [kl], metric: agreement, value: 6, source: x}",
            "kl has no metric 'agreement'; it has kl, median, 99th",
        ),
        ("{tasks: [piqa], metric: acc, value: 60.14, source: x}", "fractions: write 0.6014 for 60.14 %"),
        ("{tasks: [], metric: acc, value: 0.6, source: x}", "tasks: .*at least 1 item"),
        ("{tasks: [piqa], metric: acc, value: .nan, source: x}", "value: .*finite"),
        ("{tasks: [piqa], metric: acc, value: 0.6, source: ''}", "source: .*at least 1 character"),
        ("{tasks: [piqa], metric: acc, value: 0.6}", "source: missing"),
        ("{tasks: [piqa], metric: acc, value: 0.6, source: x, paper: y}", "paper: unknown key"),
    ],
)
def test_faults_name_the_entry(tmp_path: Path, entry: str, fault: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{path: x}}\nmethod: {{name: rtn}}\noutput: {{path: y}}\nexpected: [{entry}]\n")
    with pytest.raises(InputError, match=rf"(?s)has 1 fault:\s+expected\.0.*{fault}"):
        recipe.load(path)


def test_set_adds_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: x}\nmethod: {name: rtn}\noutput: {path: y}\n")
    entry = yaml.safe_dump(published("piqa").model_dump(mode="json"), default_flow_style=True)
    assert recipe.load(path, [f"expected.0={entry}"]).expected == (published("piqa"),)


def test_a_run_and_a_later_evaluation_print_the_numbers_of_the_recipe(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.chdir(tmp_path)
    raw = {
        "model": {"path": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "method": {"name": "rtn"},
        "quant": {"group_size": 32},
        "eval": {"tasks": ["generated"], "limit": 2, "context": 32},
        "expected": [
            {"tasks": ["generated"], "metric": "perplexity", "value": 10.0, "source": PAPER},
            {"tasks": ["c4"], "metric": "perplexity", "value": 8.5, "source": PAPER},
        ],
        "output": {"path": "q"},
    }
    Path("r.yaml").write_text(yaml.safe_dump(raw))
    for command in (["ptq", "r.yaml"], ["eval", "q", "--tasks", "generated", "--limit", "2"], ["eval", "r.yaml"]):
        assert main.main([*command, "--json"]) == 0
        ours, missing = json.loads(capsys.readouterr().out)["report"]["expected"]
        assert ours["difference"] == pytest.approx(ours["measured"] - 10)
        assert ours["note"] == "limit 2"
        assert missing["note"] == "not measured: c4 was not evaluated"
    del raw["method"], raw["quant"], raw["output"]
    Path("float.yaml").write_text(yaml.safe_dump(raw))
    assert main.main(["eval", "float.yaml"]) == 0
    assert f"| c4 | perplexity | 8.5 | not measured |  | {PAPER}; not measured: c4" in capsys.readouterr().out
