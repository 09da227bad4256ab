"""Embeddings and heads in what is measured and reported: sizes, bits, errors, labels, and checks of token ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.packed_tables import GRID, written
from safetensors.torch import load_file

from qtool.checkpoints import sizes
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import EvalConfig, ModelConfig
from qtool.data.vocabulary import check_ids, checked_ids
from qtool.evaluation.weights import table_records
from qtool.models.loading import load_model
from qtool.pipelines.evaluate import evaluate
from qtool.pipelines.verify import verify
from qtool.quant.affine import relative_error
from qtool.quant.packed_embedding import PackedEmbedding
from qtool.reports.report import Report, read_report
from qtool.system.errors import InputError

ROWS, CHANNELS = tiny.VOCABULARY, tiny.HIDDEN
PACKED_8 = ROWS * CHANNELS + 2 * ROWS + 17  # codes, float16 scales, the shape and one byte
PACKED_4 = ROWS * CHANNELS // 2 + 2 * ROWS * 2 + 17
FLOAT = 2 * ROWS * CHANNELS  # the Llamas are bfloat16, GPT-2 is float32
FLOAT_BYTES = {"bfloat16": 2, "float32": 4}
EIGHT = {"num_bits": 8}
# family and grids -> label, and name, role, grid, bytes, bytes in 8 bits of each table
CASES: dict[str, tuple[str, dict[str, Any], str, list[tuple[str, str, str, int, int | None]]]] = {
    "tied float": (
        "tied",
        {},
        "w4g32",
        [("model.embed_tokens", "embedding and head (tied)", "bfloat16", FLOAT, PACKED_8)],
    ),
    "tied": (
        "tied",
        {"embedding": EIGHT},
        "w4g32, embedding w8pc",
        [("model.embed_tokens", "embedding and head (tied)", "w8pc", PACKED_8, None)],
    ),
    "untied float": (
        "untied",
        {},
        "w4g32",
        [
            ("model.embed_tokens", "embedding", "bfloat16", FLOAT, PACKED_8),
            ("lm_head", "head", "bfloat16", FLOAT, PACKED_8),
        ],
    ),
    "untied, both alike": (
        "untied",
        {"embedding": GRID},
        "w4g32, embedding and head w4g32",
        [("model.embed_tokens", "embedding", "w4g32", PACKED_4, None), ("lm_head", "head", "w4g32", PACKED_4, None)],
    ),
    "untied, each its own": (
        "untied",
        {"embedding": EIGHT, "head": GRID},
        "w4g32, embedding w8pc, head w4g32",
        [("model.embed_tokens", "embedding", "w8pc", PACKED_8, None), ("lm_head", "head", "w4g32", PACKED_4, None)],
    ),
    "float head": (
        "untied",
        {"embedding": EIGHT, "head": "float"},
        "w4g32, embedding w8pc",
        [
            ("model.embed_tokens", "embedding", "w8pc", PACKED_8, None),
            ("lm_head", "head", "bfloat16", FLOAT, PACKED_8),
        ],
    ),
    "head alone": (
        "untied",
        {"head": EIGHT},
        "w4g32, head w8pc",
        [
            ("model.embed_tokens", "embedding", "bfloat16", FLOAT, PACKED_8),
            ("lm_head", "head", "w8pc", PACKED_8, None),
        ],
    ),
    "gpt2": (
        "gpt2",
        {"embedding": EIGHT},
        "w4g32, embedding w8pc",
        [
            ("transformer.wte", "embedding and head (tied)", "w8pc", PACKED_8, None),
            ("transformer.wpe", "embedding wpe", "w8pc", tiny.CONTEXT * (CHANNELS + 2) + 17, None),
        ],
    ),
    "gpt2 float": (
        "gpt2",
        {},
        "w4g32",
        [
            ("transformer.wte", "embedding and head (tied)", "float32", 2 * FLOAT, PACKED_8),
            (
                "transformer.wpe",
                "embedding wpe",
                "float32",
                4 * tiny.CONTEXT * CHANNELS,
                tiny.CONTEXT * (CHANNELS + 2) + 17,
            ),
        ],
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("tables")
    return {name: written(at, family, tables) for name, (family, tables, _, _) in CASES.items()}


def report_of(folder: Path) -> Report:
    report = read_report(folder)
    assert report is not None
    return report


@pytest.mark.parametrize("case", CASES)
def test_embeddings_and_head_have_rows_of_their_own(case: str, folders: dict[str, Path]) -> None:
    report, (_, _, label, expected) = report_of(folders[case]), CASES[case]
    assert report.label == label
    found = [(each.name, each.role, each.grid, each.num_bytes, each.int8_bytes) for each in report.tables]
    assert found == expected
    assert report.bits_per_weight == 4.5, "that of the linears alone"
    names = {each.name for each in report.linears}
    assert not names & {each.name for each in report.tables}
    source = NativeCheckpoint(folders[case])
    stored = {name: tensor.nbytes for name, tensor in tiny.stored(folders[case]).items()}
    for each in report.tables:
        bits = (
            8.0 * FLOAT_BYTES[each.grid] if each.num_bits is None else source.specs[each.name].bits_per_weight(CHANNELS)
        )
        assert each.bits_per_weight == bits
        assert each.num_bytes == sum(size for name, size in stored.items() if name.startswith(f"{each.name}."))
        assert (each.num_bits is None) == (each.name not in source.specs)


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_the_whole_file_are_all_bits_for_each_weight_once(case: str, folders: dict[str, Path]) -> None:
    report, folder = report_of(folders[case]), folders[case]
    floats = tiny.stored(folder.parent.parent / "float" / CASES[case][0])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = sum(tensor.numel() for name, tensor in floats.items())  # tied weights are in the file once
    assert report.quantized_bytes == size
    assert report.file_bits_per_weight == 8 * size / weights
    assert sizes.file_bits(NativeCheckpoint(folder)) == report.file_bits_per_weight


@pytest.mark.parametrize("case", CASES)
def test_the_errors_of_tables_are_those_of_what_is_on_the_disk(case: str, folders: dict[str, Path]) -> None:
    source = NativeCheckpoint(folders[case])
    floats = load_file(folders[case].parent.parent / "float" / CASES[case][0] / "model.safetensors")
    for each in report_of(folders[case]).tables:
        if each.num_bits is None:
            assert each.weight_error is None
            continue
        error = relative_error(floats[f"{each.name}.weight"], source.quantized(each.name))
        assert each.weight_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_of_the_folder_reports_the_same_sizes(case: str, folders: dict[str, Path]) -> None:
    model = ModelConfig(path=str(folders[case]), dtype="float32", device="cpu")
    config = EvalConfig(tasks=("generated",), limit=1, context=16)
    found, made = evaluate(model, config).report, report_of(folders[case])
    for key in ("label", "bits_per_weight", "file_bits_per_weight", "quantized_bytes", "linears", "tables"):
        assert getattr(found, key) == getattr(made, key), key
    (row,) = found.results
    assert row.value is not None
    assert 0 < row.value < 10 * tiny.VOCABULARY


def test_all_quantized_weights_have_the_bits_that_a_budget_counts(folders: dict[str, Path]) -> None:
    report, source = report_of(folders["untied, each its own"]), NativeCheckpoint(folders["untied, each its own"])
    (row,) = (row for table in report.document().tables for row in table.rows if row[0] == "all quantized")
    assert row[2] == f"{sizes.bits_per_weight(source.specs, source.shapes):.3f}"


@pytest.mark.parametrize("case", CASES)
def test_verify_compares_the_bits_of_the_linears_and_counts_embeddings(case: str, folders: dict[str, Path]) -> None:
    report, found = report_of(folders[case]), verify(folders[case])
    packed = [each for each in report.tables if each.num_bits is not None]
    embeddings = [each for each in packed if each.role != "head"]
    linears = 8 if CASES[case][0] == "gpt2" else 14
    assert found[1:] == (linears + len(packed) - len(embeddings), 4.5, len(embeddings))


def test_a_report_without_these_keys_is_read_and_shows_no_such_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((folders["tied"] / "report.json").read_text())
    for key in ("tables", "file_bits_per_weight"):
        del content[key]
    (tmp_path / "report.json").write_text(json.dumps(content))
    report = report_of(tmp_path)
    assert report.tables == ()
    assert report.document().tables == []
    assert dict(report.facts())["bits per weight"] == "4.500 (scales and zero points counted)"


def test_an_embedding_that_reads_its_table_in_a_way_of_its_own_has_no_size_in_8_bits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.evaluation.weights.can_stand_for", lambda module: False)
    folder = folders["untied float"]
    loaded = load_model(ModelConfig(path=str(folder), device="cpu"), quantized=True)
    embedding, head = table_records(loaded, NativeCheckpoint(folder), {})
    assert (embedding.int8_bytes, head.int8_bytes) == (None, PACKED_8)


def test_token_ids_are_compared_with_the_rows_of_a_packed_embedding(folders: dict[str, Path]) -> None:
    loaded = load_model(ModelConfig(path=str(folders["tied"]), dtype="float32", device="cpu"), quantized=True)
    assert isinstance(loaded.model.get_input_embeddings(), PackedEmbedding)
    assert loaded.num_embeddings == tiny.VOCABULARY
    foreign = torch.tensor([[0, tiny.VOCABULARY]])
    with pytest.raises(InputError, match=r"token 320 .*has no row in the embedding table .* 320 rows"):
        check_ids(foreign, loaded, "a text")
    with pytest.raises(InputError, match=r"a text: token 320"), checked_ids(loaded, "a text"):
        loaded.model(foreign)
    with checked_ids(loaded, "a text"):
        loaded.model(tiny.probe())
