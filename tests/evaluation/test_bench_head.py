"""``qtool bench`` of checkpoints with packed embeddings and heads: a variant with a float head is measured beside."""

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.packed_tables import GRID, written

from qtool.config.sweep import BenchConfig
from qtool.evaluation.bench import bench
from qtool.models import expanded
from qtool.models.linears import packed_weights
from qtool.reports import bench_report
from qtool.reports.bench_report import DENSE, EXACT, FAST, FLOAT_HEAD, PREFILL, BenchReport, Variant, decode

PLAN = BenchConfig(prompt_tokens=8, new_tokens=2, repeats=1, dtype="float32", backend="torch")
ROWS = tiny.VOCABULARY * tiny.HIDDEN  # weights of an embedding, and of a head
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("tied", {"embedding": {"num_bits": 8}}),
    "untied": ("untied", {"embedding": {"num_bits": 8}, "head": GRID}),
    "only the embedding": ("untied", {"embedding": {"num_bits": 8}, "head": "float"}),
    "only the head": ("untied", {"head": {"num_bits": 8}}),
    "gpt2": ("gpt2", {"embedding": {"num_bits": 8}}),
}


def packed_bytes(bits: int, groups: int) -> int:
    """Return the bytes of a packed table in files: codes, float16 scales, its shape and one byte."""
    return ROWS * bits // 8 + tiny.VOCABULARY * groups * 2 + 16 + 1


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BenchReport]:
    at = tmp_path_factory.mktemp("bench")
    return {name: bench(str(written(at, *case)), "cpu", PLAN) for name, case in CASES.items()}


@pytest.mark.parametrize(
    ("case", "table"),
    [("tied", packed_bytes(8, 1)), ("untied", packed_bytes(4, 2)), ("only the head", packed_bytes(8, 1))],
)
def test_a_packed_head_is_measured_beside_a_float_one(case: str, table: int, reports: dict[str, BenchReport]) -> None:
    report = reports[case]
    assert [variant.name for variant in report.variants] == [DENSE, FAST, FLOAT_HEAD, EXACT]
    fast, other = report.variant(FAST), report.variant(FLOAT_HEAD)
    assert fast.title == "w4g32 torch"
    assert other.title == "w4g32 torch, float head"
    assert other.file_bytes == fast.file_bytes - table + 4 * ROWS
    assert "the head" in fast.linears
    assert "the head" not in other.linears
    assert other.linears.startswith("14 linears by int4 (cpu)")
    assert any(line.startswith("packed head against float head: decode, batch 1 ") for line in report.notes())


def test_without_a_packed_head_there_is_no_such_variant(reports: dict[str, BenchReport]) -> None:
    report = reports["only the embedding"]
    assert [variant.name for variant in report.variants] == [DENSE, FAST, EXACT]
    assert report.of_head() == []


@pytest.mark.parametrize(
    ("case", "remark"),
    [
        ("tied", None),
        ("untied", None),
        ("gpt2", None),
        ("only the embedding", "head stays float32 in every column: 0 MB"),
        ("only the head", "embeddings stay float32 in every column: 0 MB"),
    ],
)
def test_what_stays_float_in_every_column_is_said_only_where_it_does(
    case: str, remark: str | None, reports: dict[str, BenchReport]
) -> None:
    said = [line for line in reports[case].notes() if "in every column" in line]
    assert said == ([] if remark is None else [remark])


def test_the_label_is_in_the_title_and_that_of_linears_in_the_columns(reports: dict[str, BenchReport]) -> None:
    assert ", w4g32, embedding w8pc, head w4g32, " in reports["untied"].title()
    assert reports["tied"].variant(DENSE).title == "dense float32"


def test_the_dense_variant_has_no_packed_layer_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[set[str]] = []
    expand = expanded.expand

    def watched(model: Any, names: Any, *rest: Any) -> int:
        grown = expand(model, names, *rest)
        left.append(set(packed_weights(model)))
        return grown

    monkeypatch.setattr("qtool.evaluation.bench.expand", watched)
    report = bench(str(written(tmp_path, *CASES["tied"])), "cpu", PLAN)
    float_head, dense = left
    assert len(float_head) == 14
    assert dense == set()
    floats = tiny.stored(tmp_path / "float" / "tied")
    assert report.variant(DENSE).file_bytes == 4 * sum(tensor.numel() for tensor in floats.values())


def test_the_heads_are_compared_by_their_speeds_of_decoding() -> None:
    def variant(name: str, tokens: float) -> Variant:
        speeds = {measure: bench_report.speed(1, [1 / tokens], [None]) for measure in (decode(1), decode(8), PREFILL)}
        sizes = {"file_bytes": 1, "weight_bytes": 1, "peak_bytes": 1}
        return Variant(name=name, title=f"w4g64 {name}", linears="none", speeds=speeds, **sizes)

    variants = (variant(DENSE, 1.0), variant(FAST, 3.0), variant(FLOAT_HEAD, 2.0), variant(EXACT, 1.0))
    machine = {"dtype": "float32", "device": "cpu", "threads": 1, "prompt_tokens": 8, "energy": "none"}
    report = BenchReport(path="x", label="w4g64, embedding w8pc", variants=variants, **machine)
    (line,) = report.of_head()
    assert line == "packed head against float head: decode, batch 1 1.50 x, decode, batch 8 1.50 x"
    assert line in report.notes()
    (table,) = report.document().tables
    assert table.columns == ["", "w4g64 dense", "w4g64 fast", "w4g64 float head", "w4g64 exact"]
    assert table.narrow is not None
    assert table.narrow.columns == ["", DENSE, FAST, FLOAT_HEAD, EXACT]
