"""The sizes of embeddings and head in a report: the table of the parts of the files, and the line on float ones."""

import io
from typing import Any

import pytest
from helpers.html import Tree
from rich.console import Console

from qtool.reports import html, parts
from qtool.reports.comparison import comparison
from qtool.reports.records import Linear, ModelTable
from qtool.reports.report import Report

SHAPE = (1000, 100)
FLOAT: dict[str, Any] = {"grid": "float16", "bits_per_weight": 16.0, "num_bytes": 200_000, "int8_bytes": 102_017}
PACKED: dict[str, Any] = {
    "grid": "w8pc",
    "num_bits": 8,
    "bits_per_weight": 8.16,
    "num_bytes": 102_017,
    "weight_error": 0.0004,
}


def table(role: str = "embedding and head (tied)", **fields: Any) -> ModelTable:
    return ModelTable(name=f"model.{role}", role=role, shape=SHAPE, **fields)


def report(*tables: ModelTable, **fields: Any) -> Report:
    linears = (Linear(name="model.layers.0.up", shape=(100, 400), num_bits=4, grid="w4g64"),)
    known = {"model": "m", "quantized": "q", "label": "w4g64", "bits_per_weight": 4.25, "quantized_bytes": 250_000}
    return Report.model_validate({**known, "linears": linears, "tables": tables, "file_bits_per_weight": 14.1} | fields)


def rows(of: Report) -> dict[str, list[str]]:
    made = parts.table(of)
    assert made is not None
    errors = ["weight error"] if any(each.weight_error is not None for each in of.tables) else []
    assert list(made.columns) == ["weights on disk", "grid", "bits/weight", "size", "of file", *errors]
    return {row[0]: list(row[1:]) for row in made.rows}


def test_the_parts_add_up_to_the_file() -> None:
    assert rows(report(table(**PACKED))) == {
        "linears": ["w4g64", "4.250", "0.02 MB", "8 %", ""],
        "embedding and head (tied)": ["w8pc", "8.160", "0.10 MB", "41 %", "2.00 %"],
        "other tensors": ["", "", "0.13 MB", "51 %", ""],
        "all quantized": ["", f"{(0.4 * 4.25 + 8.16) / 1.4:.3f}", "0.12 MB", "49 %", ""],
        "whole file": ["", "14.100", "0.25 MB", "100 %", ""],
    }
    found = rows(report(table(**FLOAT)))
    assert found["embedding and head (tied)"] == ["float16", "16.000", "0.20 MB", "80 %"]
    assert "all quantized" not in found, "it would be the linears again"


def test_linears_on_several_grids_are_mixed() -> None:
    other = Linear(name="model.layers.0.down", shape=(100, 400), num_bits=2, grid="w2g64")
    left = Linear(name="model.layers.0.gate", shape=(100, 400))
    made = report(table(**FLOAT))
    assert rows(made.model_copy(update={"linears": (*made.linears, left)}))["linears"][0] == "w4g64"
    assert rows(made.model_copy(update={"linears": (*made.linears, other)}))["linears"][0] == "mixed"


def test_linears_that_stay_float_have_a_row_of_their_own() -> None:
    left = [Linear(name=f"model.layers.0.{i}", shape=(100, 50), float_bytes=10_000) for i in range(2)]
    made = report(table(**FLOAT))
    found = rows(made.model_copy(update={"linears": (*made.linears, *left)}))
    assert found["2 float linears"] == ["float", "16.000", "0.02 MB", "8 %"]
    assert found["other tensors"][2] == "0.01 MB"


def test_a_line_says_why_the_file_shrinks_less_than_its_linears() -> None:
    float_bytes = 2 * (40_000 + 100_000)
    whole = 250_000 * 8 / 140_000
    made = report(table(**FLOAT), float_bytes=float_bytes, file_bits_per_weight=whole)
    (line,) = set(parts.lines(made)) - set(parts.float_lines(made))
    assert line == (
        "the quantized linears are 3.8 x smaller than in the float model, and the whole file is 1.1 x smaller, because "
        "these linears are 8 % of it; the rest: embedding and head (tied) 80 % (float16), other tensors 12 %"
    )
    small = report(table(**FLOAT | {"num_bytes": 200}), float_bytes=80_000, quantized_bytes=22_000)
    assert not set(parts.lines(small)) - set(parts.float_lines(small))


@pytest.mark.parametrize(
    ("tables", "lines"),
    [
        ([table(**PACKED)], []),
        (
            [table(**FLOAT)],
            [
                "embedding and head stay float16: 0.20 MB of 0.25 MB, 80 % of the file; quant.embedding: {num_bits: 8} "
                "makes them 0.10 MB"
            ],
        ),
        (
            [table("embedding", **FLOAT), table("head", **FLOAT)],
            [
                "embedding and head stay float16: 0.40 MB of 0.25 MB, 160 % of the file; quant.embedding: {num_bits: 8}"
                " and quant.head: {num_bits: 8} make them 0.20 MB"
            ],
        ),
        (
            [table("embedding", **PACKED), table("head", **FLOAT)],
            ["head stays float16: 0.20 MB of 0.25 MB, 80 % of the file; quant.head: {num_bits: 8} makes it 0.10 MB"],
        ),
        (
            [table("embedding", **FLOAT), table("head", **PACKED)],
            [
                "embedding stays float16: 0.20 MB of 0.25 MB, 80 % of the file; quant.embedding: {num_bits: 8} makes it"
                " 0.10 MB"
            ],
        ),
        (
            [table(**FLOAT), table("embedding wpe", **FLOAT | {"grid": "float32"})],
            [
                "embedding and head, embedding wpe stay float16/float32: 0.40 MB of 0.25 MB, 160 % of the file; "
                "quant.embedding: {num_bits: 8} makes them 0.20 MB"
            ],
        ),
        (
            [table("embedding", **FLOAT | {"int8_bytes": None}), table("head", **FLOAT)],
            [
                "head stays float16: 0.20 MB of 0.25 MB, 80 % of the file; quant.head: {num_bits: 8} makes it 0.10 MB",
                "embedding stays float16: 0.20 MB of 0.25 MB, 80 % of the file",
            ],
        ),
    ],
)
def test_a_line_says_what_stays_float_how_much_it_is_and_which_key_changes_it(
    tables: list[ModelTable], lines: list[str]
) -> None:
    made = report(*tables)
    assert parts.float_lines(made) == made.document().notes == lines
    assert all(f"* {line}" in made.markdown() for line in lines)


def test_pages_and_the_terminal_show_table_and_line() -> None:
    made = report(table(**FLOAT))
    text = Tree(html.page(made, [])).text
    (line,) = parts.float_lines(made)
    for part in (
        "embedding and head (tied) float16 16.000 0.20 MB 80 %",
        f"{line[0].upper()}{line[1:]}.",
        "whole file 14.10",
    ):
        assert part in text, part
    written = io.StringIO()
    made.render(Console(file=written, width=80, force_terminal=False))
    assert max(map(len, written.getvalue().splitlines())) <= 80
    assert "embedding and head (tied)  float16" in written.getvalue()
    assert ("bits per weight", "4.250 (scales and zero points counted); whole file 14.100") in made.facts()


@pytest.mark.parametrize("missing", ["tables", "quantized_bytes", "bits_per_weight"])
def test_a_report_that_lacks_a_number_has_no_such_table(missing: str) -> None:
    made = report(table(**FLOAT)).model_copy(update={missing: () if missing == "tables" else None})
    assert parts.table(made) is None
    assert "other tensors" not in made.markdown()
    assert "other tensors" not in html.page(made, [])


def test_a_comparison_has_the_bits_of_the_file_where_one_is_known() -> None:
    known, unknown = report(), report(file_bits_per_weight=None)
    found = comparison({"a": known, "b": unknown})
    assert list(found.table().columns[2:5]) == ["bits/weight", "of file", "size"]
    assert sorted(list(row[2:5]) for row in found.table().rows) == [
        ["4.250", "", "0.25 MB"],
        ["4.250", "14.100", "0.25 MB"],
    ]
    assert {run["file_bits_per_weight"] for run in found.as_dict()["runs"]} == {14.1, None}
    assert list(comparison({"b": unknown}).table().columns[2:4]) == ["bits/weight", "size"]
