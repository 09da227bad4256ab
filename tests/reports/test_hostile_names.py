"""Names from outside are shown as text in every report: they break no table, make no markup, and hide no text."""

import ast
import io
import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markupsafe import Markup
from rich.console import Console

from qtool.reports import html, model_card
from qtool.reports.base_card import BaseCard
from qtool.reports.compared_paths import compare
from qtool.reports.document import as_markdown
from qtool.reports.records import TaskResult
from qtool.reports.report import Report

MARKUP = "a|b `c` <b>d</b> [l](http://e) ![i](x) &#x202e; **e** \\| \\"
HOSTILE = f"{MARKUP}\n# x\x1b[2J\x9b31m\u202e http://u:secret@h"
SHOWN = rf"{MARKUP}\n# x\x1b[2J\x9b31m\u202e http://***@h"
UNSEEN = set("\x1b\x9b\u202e\udc80")


@pytest.fixture
def report() -> Report:
    row = TaskResult(task=HOSTILE, metric=HOSTILE, value=1.0, stderr=0.1, n=3, note=HOSTILE, higher_is_better=True)
    made = Report(model=HOSTILE, label="w4", method="rtn", bits_per_weight=4.0, quantized_bytes=1, results=(row,))
    return made.model_copy(update={"quantized": f"out/\udc80{HOSTILE}"})  # a folder whose name is not UTF-8


def rendered(markdown: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(markdown))


def check(text: str) -> None:
    assert not set(text) & UNSEEN
    assert "secret" not in text


def test_a_table_in_markdown_keeps_its_cells_and_shows_names_as_they_are(report: Report) -> None:
    page = rendered(report.markdown())
    check(page)
    for tag in ("<b>", "<a ", "<img", "<code>"):
        assert tag not in page
    assert page.count("<tr>") == 2
    assert page.count("<td") == page.count("<th") - page.count("<thead")
    assert page.count("<h1>") == 1
    shown = SHOWN.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert page.count(shown) >= 4  # title, task, metric and footnote


@given(st.text(st.characters(exclude_categories=["C", "Z"])))
@example("/_a_/ * *b* [[x](y)](z) \\* &lt;&#60; `a`")
def test_any_text_is_shown_by_markdown_as_it_is(text: str) -> None:
    assert Markup(rendered(as_markdown(f"x{text}y"))).striptags() == f"x{text}y"


def test_pages_and_the_terminal_show_names_without_control_characters(report: Report) -> None:
    check(html.page(report, []))
    check(report._repr_html_())
    screen = io.StringIO()
    report.render(Console(file=screen, width=100))
    check(screen.getvalue())


def test_a_model_card_has_a_header_and_code_that_can_be_read(report: Report, tmp_path: Path) -> None:
    name = 'a"; import os #\n```\x1b[2J\udc80'
    model_card.write(tmp_path, report, "qtool.json", name)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    check(card)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "qtool",
        "tags": ["qtool"],
        "model-index": yaml.safe_load(header)["model-index"],
    }
    code = body.split("```python\n")[1].split("\n```\n")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = [ast.literal_eval(call.args[0]) for call in calls]
    assert names == ["."] * 2
    base = {"base": HOSTILE, "label": "w4", "format": "gptq", "library": "x", "notes": [HOSTILE], "card": BaseCard()}
    model_card.write_export(tmp_path, **base, differences={"weight_difference": 0, "logit_difference": 0})  # type: ignore[arg-type] # of several types
    check((tmp_path / "README.md").read_text(encoding="utf-8"))


def test_the_command_on_the_page_names_one_folder(report: Report) -> None:
    page = html.page(report.model_copy(update={"quantized": "out; rm -rf x"}), [])
    assert "qtool eval &#39;out; rm -rf x&#39;" in page


@pytest.mark.filterwarnings("error")
def test_files_of_a_comparison_are_written_for_any_names(report: Report, tmp_path: Path) -> None:
    for name in ("a\x1b[2J|\u202e", os.fsdecode(b"b\x80")):
        (tmp_path / name).mkdir()
        report.model_copy(update={"quantized": "out"}).write(tmp_path / name)
    found = compare(list(tmp_path.iterdir()))
    found.write(tmp_path / "out")
    for file in ("compare.html", "compare.md", "compare.json"):
        check((tmp_path / "out" / file).read_text(encoding="utf-8"))
    for plot in (tmp_path / "out" / "plots").glob("*.svg"):
        check(plot.read_text(encoding="utf-8"))
    assert rendered(found.markdown()).count("<tr>") == 3, "no float model and no settings"


def test_a_report_in_json_is_ascii_without_secrets_and_says_the_rest(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="ascii")
    check(text)
    assert json.loads(text)["results"][0]["task"] == HOSTILE.replace("u:secret", "***")
