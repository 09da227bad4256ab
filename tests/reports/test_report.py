"""The report: its content in JSON, Markdown and on the terminal."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from qtool.reports.records import Metric, Series, TaskResult, task_result
from qtool.reports.report import Report
from qtool.reports.text import number


def row(
    task: str,
    metric: str,
    value: tuple[float, float | None],
    reference: tuple[float, float] | None = None,
    **fields: bool | float | str,
) -> TaskResult:
    """Return one row; ``value`` and ``reference`` are a number and its standard error."""
    other = None if reference is None else Metric(value=reference[0], stderr=reference[1], n=10)
    return task_result(task, metric, Metric(value=value[0], stderr=value[1], n=10), other, **fields)


@pytest.fixture
def report() -> Report:
    chance = {"num_fewshot": 5, "limit": 20, "higher_is_better": True}
    names = ("mmlu_humanities", *(f"mmlu_subject_{i}" for i in range(57)))
    members = tuple(row(name, "acc", (0.25, 0.1), (0.2, 0.1), detail=True, **chance) for name in names)
    return Report(
        model="builtin:wiki-llama-3m",
        quantized="out/w4",
        label="w4g64",
        method="gptq",
        bits_per_weight=4.25,
        float_bytes=6_824_448,
        quantized_bytes=3_000_000,
        seconds={"quantize": 4.2, "evaluate": 3661.0},
        command="ptq",
        recipe="model:\n  path: builtin:wiki-llama-3m\n",
        machine={"processor": "A CPU", "cores": "2", "memory": "8.0 GB", "GPU": "A GPU, 24.0 GB"},
        results=(
            row(
                "wikitext2", "perplexity", (35.1234, 0.4321), (34.0712, 0.4123), delta_stderr=0.0321, note="417 windows"
            ),
            row("kl", "kl", (0.0312345, 0.000456), note="against the float model"),
            TaskResult(task="generated", metric="perplexity", value=None, note="not measured: no reason"),
            row("mmlu", "acc", (0.25, 0.0112), (0.255, 0.0113), **chance),
            *members,
        ),
        dtype="float32",
        device="cpu",
        seed=0,
        environment={"python": "3.11.0", "torch": "2.13.0"},
        date="2025-01-01T00:00:00+00:00",
    )


def rendered(report: Report, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    report.render(Console(file=file, width=80, force_terminal=False))
    file.flush()
    return written.getvalue().decode(encoding)


def test_the_change_is_quantized_minus_float() -> None:
    assert row("t", "m", (3.0, 0.1), (2.5, 0.1)).delta == 0.5
    assert row("t", "m", (3.0, 0.1)).delta is None


def test_the_json_file_holds_everything_and_comes_back_equal(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert Report.model_validate_json(text) == report
    assert len(json.loads(text)["results"]) == 5 + 57
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.markdown()


def test_numbers_that_are_none_stay_what_they_are_in_strict_json(tmp_path: Path) -> None:
    results = (row("a", "perplexity", (math.inf, math.nan)), row("b", "perplexity", (math.nan, None)))
    report = Report(model="m", results=results)
    report.write(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=refuse)
    first, second = Report.model_validate_json(text).results
    assert first.value == math.inf
    assert second.value is not None
    assert math.isnan(second.value)
    json.dumps(report.model_dump(mode="json"), allow_nan=False)
    assert "inf" in rendered(report)
    assert "nan" in report.markdown()


def test_a_report_of_a_later_version_can_be_read(report: Report) -> None:
    later = json.loads(report.model_dump_json()) | {"new": 1}
    assert Report.model_validate(later) == report


def test_tables_show_groups_and_not_their_parts(report: Report) -> None:
    for text in (report.markdown(), rendered(report)):
        assert "mmlu" in text
        assert "mmlu_humanities" not in text
        assert "mmlu_subject_1" not in text


def test_markdown_has_float_and_quantized_side_by_side_with_standard_errors(report: Report) -> None:
    lines = report.markdown().splitlines()
    assert lines[0] == "# builtin:wiki-llama-3m, gptq w4g64"
    assert "| task | metric | float | quantized | change | shots | n |" in lines
    assert "| wikitext2 [1] | perplexity | 34.07 ± 0.41 | 35.12 ± 0.43 | +1.052 ± 0.032 |  | 10 |" in lines
    assert "| kl [2] | kl |  | 0.03123 ± 0.00046 |  |  | 10 |" in lines
    assert "| mmlu [4] | acc | 0.255 ± 0.011 | 0.250 ± 0.011 | -0.005 | 5 | 10 |" in lines
    assert "| generated [3] | perplexity |  | not measured |  |  |  |" in lines
    assert "3. not measured: no reason" in lines
    assert "4. 5-shot; limit 20" in lines
    assert "* bits per weight: 4.250 (scales and zero points counted)" in lines
    assert "* weights on disk: 6.82 MB float, 3.00 MB quantized" in lines
    assert "* time: quantize 4.2 s, evaluate 1:01:01" in lines
    assert "* machine: A CPU, 2 cores, 8.0 GB memory, GPU A GPU, 24.0 GB" in lines
    assert lines[-1] == "Environment: python 3.11.0, torch 2.13.0."


def test_the_table_fits_80_columns_and_is_complete(report: Report) -> None:
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "34.07 ± 0.41",
        "35.12 ± 0.43",
        "+1.052 ± 0.032",
        "mmlu acc [4] ",
        "not measured",
        "3. not measured",
    ):
        assert part in text, part


def test_the_table_is_readable_on_a_terminal_without_unicode(report: Report) -> None:
    assert "34.07 +- 0.41" in rendered(report, encoding="ascii")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (9999.4, "9999"),
        (25180.3, "25,180"),
        (-31234.6, "-31,235"),
        (1e6, "1.000e+06"),
        (math.inf, "inf"),
        (None, ""),
    ],
)
def test_a_number_without_an_error_has_four_digits_and_no_exponent_where_it_can_be_read(
    value: float | None, shown: str
) -> None:
    assert number(value, None) == shown


def test_a_float_model_alone_has_one_column_of_values() -> None:
    report = Report(model="m", results=(row("wikitext2", "perplexity", (34.0712, 0.4123), limit=3),))
    assert "| task | metric | value | shots | n |" in report.markdown()
    assert "1. limit 3" in report.markdown()
    assert "| wikitext2 [1] | perplexity | 34.07 ± 0.41 |  | 10 |" in report.markdown()


def test_markup_in_names_is_text() -> None:
    report = Report(model="[red]m[/red]", results=(row("a|b", "[bold]x", (1.0, None)),))
    assert "[red]m[/red]" in rendered(report)
    assert "[bold]x" in rendered(report)
    assert "a\\|b" in report.markdown()


def test_the_recipe_is_there_with_the_commands_that_run_it(report: Report) -> None:
    text = report.markdown()
    assert "## Recipe\n\n```yaml\nmodel:\n  path: builtin:wiki-llama-3m\n```\n" in text
    assert "$ qtool ptq recipe.yaml" in text
    assert "$ qtool reproduce out/w4 " in text
    assert "builtin:wiki-llama-3m\n```" not in report.model_copy(update={"command": None}).markdown()
    assert "recipe.yaml" not in rendered(report)
    fenced = report.model_copy(update={"recipe": "a: |\n  ````\n  x\n"}).markdown()
    assert "`````yaml\na: |\n  ````\n  x\n`````\n" in fenced


def test_a_report_of_an_earlier_version_names_no_machine() -> None:
    report = Report.model_validate({"model": "m"})
    assert report.machine == {}
    assert "machine" not in dict(report.facts())


def test_the_environment_names_what_numbers_depend_on() -> None:
    assert {"python", "platform", "torch", "transformers", "lm_eval"} <= Report(model="m").environment.keys()


@pytest.mark.parametrize(
    ("losses", "warned"),
    [((0.5, 0.7, 0.6), True), ((0.5, 0.5), True), ((0.5, 0.4, 0.6), False), ((0.5,), False)],
)
def test_a_training_that_kept_its_start_is_warned_of(losses: tuple[float, ...], warned: bool) -> None:
    """Of no step at all there is one validation, and no warning."""
    series = Series(name="loss", per="validation", at=tuple(range(len(losses))), values=losses)
    found = Report(model="m", series=(series,)).markdown()
    assert (
        "> **Warning:** no state of the training had a lower validation loss than its start (0.5)" in found
    ) == warned
