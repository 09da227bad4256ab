"""A document in its two forms: the same content as Markdown and in a terminal."""

import io
import itertools
from typing import Any

from helpers.html import Tree
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qtool.reports.document import Document, Printable, Table, parts


class Sheet(Printable):
    def __init__(self, **fields: Any) -> None:  # Any: whatever fields of a document a test gives
        self.fields = fields

    def document(self) -> Document:
        return Document(title="a title", **self.fields)


def printed(sheet: Sheet, encoding: str = "utf-8") -> str:
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding=encoding)
    sheet.render(Console(file=file, width=80, force_terminal=False))
    file.flush()
    return content.getvalue().decode(encoding)


def test_every_field_is_printed_in_both_forms() -> None:
    table = Table(["x", "y"], [["a [1]", "1 ± 2 *"]], "lr", title="numbers", footnotes=["the first"])
    sheet = Sheet(
        name="a name",
        headline="it is small",
        status="1 of 2 done",
        facts=[("size", "3 MB")],
        warnings=["take care"],
        tables=[table],
        notes=["a note"],
        environment={"python": "3"},
    )
    assert sheet.markdown() == (
        "# a name\n\na title\n\n**it is small**\n\n1 of 2 done.\n\n* size: 3 MB\n\n> **Warning:** take care\n\n"
        "## numbers\n\n| x | y |\n| --- | ---: |\n| a [1] | 1 ± 2 \\* |\n\n1. the first\n\n* a note\n\n"
        "Environment: python 3.\n"
    )
    assert [line.rstrip() for line in printed(sheet).splitlines()] == [
        "a title",
        "it is small",
        "  1 of 2 done",
        "  size: 3 MB",
        "warning: take care",
        "",
        "numbers",
        "x            y",
        "──────────────",
        "a [1]  1 ± 2 *",
        "",
        "1. the first",
        "* a note",
    ]


def test_a_narrow_table_stands_in_for_the_wide_one_in_a_terminal_only() -> None:
    sheet = Sheet(tables=[Table(["wide"], [["w"]], "l", narrow=Table(["slim"], [["s"]], "l"))])
    assert "wide" in sheet.markdown()
    assert "slim" not in sheet.markdown()
    assert "slim" in printed(sheet)
    assert "wide" not in printed(sheet)


def test_samples_of_text_are_not_printed_in_a_terminal() -> None:
    sheet = Sheet(notes=["a note"], samples=[Table(["prompt"], [["one\ntwo"]], "l", title="texts")])
    assert sheet.markdown().endswith("* a note\n\n## texts\n\n| prompt |\n| --- |\n| one\\ntwo |\n")
    assert "one\\ntwo" in sheet._repr_html_()
    assert "texts" not in printed(sheet)


def test_what_markdown_or_rich_would_take_for_markup_is_text() -> None:
    sheet = Sheet(tables=[Table(["a|b"], [["[red]c|d *"]], "l", legend="* best")], notes=["[bold]n"])
    assert "| a\\|b |" in sheet.markdown()
    assert "| [red]c\\|d \\* |" in sheet.markdown()
    assert "\n\\* best\n" in sheet.markdown()
    for text in ("a|b", "[red]c|d *", "* best", "[bold]n"):
        assert text in printed(sheet)


def test_a_terminal_without_unicode_can_print_every_part() -> None:
    table = Table(["±"], [["1 ± 2"]], "l", title="± t", footnotes=["± f"])
    sheet = Sheet(headline="± h", facts=[("±", "±")], warnings=["± w"], tables=[table], notes=["± n"])
    shown = printed(sheet, "ascii")
    for text in ("+- h", "+-: +-", "+- w", "+- t", "1 +- 2", "+- f", "+- n"):
        assert text in shown


def test_a_notebook_shows_every_field_and_runs_nothing_of_it() -> None:
    hostile = "<script>alert(1)</script> & {x}"
    table = Table(["x", hostile], [["a", hostile], ["b", "2"]], "lr", title=hostile, footnotes=[hostile])
    sheet = Sheet(
        headline=hostile, status="1 of 2", facts=[(hostile, "3")], warnings=[hostile], tables=[table], notes=[hostile]
    )
    shown = sheet._repr_html_()
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; {x}") == 8
    tags = [tag for tag, _ in Tree(shown).tags]
    assert (tags.count("tr"), tags.count("td"), tags.count("script")) == (3, 4, 0)
    assert '<td style="text-align: right">2</td>' in shown
    assert shown.startswith("<h3>a title</h3>")


words = st.text("abcde", min_size=1, max_size=7)


@given(
    st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=2, max_size=9),
    st.integers(1, 4),
    st.integers(40, 100),
    st.data(),
)
def test_parts_of_a_table_fit_and_lose_nothing(headers: list[str], rows: int, width: int, data: st.DataObject) -> None:
    names = [f"run {index}" for index in range(rows)]
    body = [[name, *(data.draw(words) for _ in headers[1:])] for name in names]
    beside = data.draw(st.sets(st.sampled_from([2, 4, 6, 8])))  # pairs, which fit any width
    table = Table(headers, body, "l" + "r" * (len(headers) - 1), "title", ["note"], "legend", beside=beside)
    found = parts(table, width)
    assert [part.title for part in found] == ["title", *[""] * (len(found) - 1)]
    assert [bool(part.footnotes and part.legend) for part in found] == [*[False] * (len(found) - 1), True]
    assert [name for part in found for name in part.columns[1:]] == headers[1:]
    for index, row in enumerate(body):
        assert [cell for part in found for cell in part.rows[index][1:]] == row[1:]
        assert all(part.rows[index][0] == row[0] for part in found)
    starts = list(itertools.accumulate((len(part.columns) - 1 for part in found), initial=1))[1:-1]
    assert not beside.intersection(starts), "a column was split from the one before"
    screen = io.StringIO()
    Sheet(tables=[table]).render(Console(file=screen, width=width))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for cell in itertools.chain(*body):
        assert cell in screen.getvalue(), "a number is never wrapped"


def test_later_parts_of_a_table_leave_out_rows_that_are_empty_there() -> None:
    table = Table(["run", "a" * 30, "b" * 30], [["x", "1", ""], ["y", "", "2"]], "lrr")
    assert [part.rows for part in parts(table, 40)] == [[["x", "1"], ["y", ""]], [["y", "2"]]]
    assert parts(table, 80) == [table]
