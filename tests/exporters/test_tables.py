"""Quantized embeddings and heads: every format holds them exactly, or refuses and names the table and what to do."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import families, tiny
from helpers.gguf_models import ROWS
from helpers.native_checkpoints import exported, plain, read_back
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint, PlannedCheckpoint
from qtool.config.quant import QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base, _folder, mlx
from qtool.models.folders import read_config
from qtool.models.tables import select_tables
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError, RunError

FORMATS = ("dense", "gguf", "mlx")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
W8: dict[str, object] = {"num_bits": 8}
BOTH: dict[str, dict[str, object]] = {  # of a tied or an untied model
    "w8pc": {"embedding": W8},
    "w8g32": {"embedding": {"num_bits": 8, "group_size": 32}},
    "w8pc-asym": {"embedding": {"num_bits": 8, "symmetric": False}},
    "w4g32": {"embedding": {"num_bits": 4, "group_size": 32}},
    "w4g32-asym": {"embedding": {"num_bits": 4, "group_size": 32, "symmetric": False}},
    "w2g16": {"embedding": {"num_bits": 2, "group_size": 16}},
}
UNTIED: dict[str, dict[str, object]] = {
    "embedding only": {"embedding": W8, "head": "float"},
    "head only": {"head": W8},
    "head of the linears": {"head": {"num_bits": 4, "group_size": 32}},
    "differ": {"embedding": {"num_bits": 4, "group_size": 32}, "head": {"num_bits": 3, "symmetric": False}},
}
CASES = [(grid, tied) for grid in BOTH for tied in (True, False)] + [(grid, False) for grid in UNTIED]


def quant(tables: dict[str, object]) -> QuantConfig:
    return QuantConfig.model_validate({"num_bits": 4, "group_size": 32} | tables)


class Checkpoints:
    """Native checkpoints of tiny Llamas with quantized tables; each is made on first use."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.logits: dict[Path, Tensor] = {}

    def __call__(self, grid: str = "w8pc", tied: bool = True) -> Path:
        floats = self.at / ("tied" if tied else "untied")
        if not floats.exists():
            tiny.llama(floats, tied=tied, blocks=1)
        out = self.at / f"{floats.name} {grid}"
        if not out.exists():
            written = tiny.quantize(floats, out, quant((BOTH | UNTIED)[grid]))
            self.logits[out] = tiny.logits(written.model)
        return out


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("natives"))


# the contract


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("grid", "tied"), CASES)
def test_a_table_is_exported_exactly_or_refused_by_name_with_what_to_do(
    name: str, grid: str, tied: bool, native: Checkpoints, tmp_path: Path
) -> None:
    folder, out = native(grid, tied), tmp_path / "out"
    source = NativeCheckpoint(folder)
    reason = _base.refusal(name, source, ExportConfig(format=name, path=out))
    if reason is not None:
        assert any(table in reason for table in (EMBEDDING, HEAD))
        assert any(way in reason for way in ("quant.embedding", "quant.head", "export "))
        with pytest.raises(InputError):
            exported(folder, name, out)
        assert not list(tmp_path.iterdir())
        return
    exported(folder, name, out)
    opened = _base.get(name).open(out)
    for table in {EMBEDDING, HEAD} & source.specs.keys():
        assert torch.equal(_base.get(name).read(opened, table), dequantize(*source.quantized(table)))
    assert {EMBEDDING, HEAD} & opened.packed() == (
        {EMBEDDING, HEAD} & source.specs.keys() if name != "dense" else set()
    )
    assert any(each.startswith(HEAD) for each in opened.names()) != tied
    assert read_config(out)["tie_word_embeddings"] == tied
    logits = tiny.logits(plain(out)) if name == "dense" else read_back(out)  # as qtool eval loads it
    assert torch.equal(logits, native.logits[folder])


@pytest.mark.parametrize("name", FORMATS)
def test_what_each_format_refuses(name: str, native: Checkpoints, tmp_path: Path) -> None:
    refused = {
        case
        for case in CASES
        if _base.refusal(name, NativeCheckpoint(native(*case)), ExportConfig(format=name, path=tmp_path))
    }
    grids = {"dense": set(), "mlx": {"w2g16"}, "gguf": {"w2g16", "w8pc-asym"}}[name]
    assert refused == {case for case in CASES if case[0] in grids}


@pytest.mark.parametrize("name", ["dense", "mlx"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt", "phi3"])
def test_scaled_embeddings_and_those_of_positions_are_exported(name: str, family: str, tmp_path: Path) -> None:
    config = families.make_config(family)
    config.tie_word_embeddings = True
    floats = families.write(config, tmp_path / "float")
    written = tiny.quantize(floats, tmp_path / "q", quant({"embedding": W8}))
    assert len(NativeCheckpoint(tmp_path / "q").tables.embeddings) == (2 if family in ("gpt2", "opt") else 1)
    if (name, family) == ("mlx", "gpt2"):
        with pytest.raises(InputError, match="is a Conv1D"):
            exported(tmp_path / "q", name, tmp_path / "out")
        return
    out = exported(tmp_path / "q", name, tmp_path / "out")
    logits = tiny.logits(plain(out)) if name == "dense" else read_back(out)
    assert torch.equal(logits, tiny.logits(written.model))


# damage


def next_up(out: Path, table: str) -> None:
    """Change the last number of a table in an export."""
    if (out / "model.gguf").exists():
        gguf = pytest.importorskip("gguf")
        there = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}[table]
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf", "r+").tensors}
        found[there].data.reshape(-1)[-1] ^= 1
        return
    name = f"{table}.weight"
    tensor = tiny.stored(out)[name].clone()
    tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16).flatten()[-1] += 1 << 24
    tiny.change(out, **{name: tensor})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("table", "tied"), [(EMBEDDING, True), (EMBEDDING, False), (HEAD, False)])
def test_a_changed_number_of_a_table_is_found(
    name: str, table: str, tied: bool, native: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
        notes: list[str] = original.write(source, out, config)
        next_up(out, table)
        return notes

    module = import_module(f"qtool.exporters.{name}")
    original = module.EXPORTER
    monkeypatch.setattr(_folder, "CHUNK_NUMBERS", 1000)  # several parts of rows
    monkeypatch.setattr(module, "EXPORTER", original._replace(write=write))
    with pytest.raises(RunError, match=f"{table} differs after export by up to .*; the export was not kept"):
        exported(native("w8pc", tied), name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_are_unpacked_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**31), 2**31, (7, 6), generator=torch.Generator().manual_seed(0)).int()
    for bits in (2, 3, 4, 8):
        whole = _folder.unpack_bits(words, bits, 192 // bits)
        monkeypatch.setattr(_folder, "CHUNK_NUMBERS", 2 * 192 // bits)
        assert [part.start for part in _folder.row_parts(whole)] == [0, 2, 4, 6]
        assert torch.equal(_folder.unpack_bits(words, bits, 192 // bits), whole)
        monkeypatch.undo()


def test_tensors_of_any_shape_are_compared_some_numbers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_folder, "CHUNK_NUMBERS", 4)
    exact, rounded = torch.tensor([1.0] * 6 + [2.0]), torch.tensor([1.0] * 6 + [2.0 + 2.0**-10])
    assert _folder.inexact([exact, torch.tensor(1.5), torch.empty(0), torch.empty(3, 0)], "bfloat16") == 0
    assert _folder.inexact([rounded, exact], "bfloat16") == 2.0**-10 / (2.0 + 2.0**-10)
    assert _folder.inexact([torch.tensor(1.0 + 2.0**-20)], "float16") == 2.0**-20 / (1.0 + 2.0**-20)


# mlx


def test_mlx_names_each_table_that_differs_and_float_heads(native: Checkpoints, tmp_path: Path) -> None:
    def section(grid: str, tied: bool) -> dict[str, Any]:
        out = exported(native(grid, tied), "mlx", tmp_path / f"{grid} {tied}")
        found: dict[str, Any] = read_config(out)["quantization"]
        assert (found["group_size"], found["bits"]) == (32, 4)
        return {name: grid for name, grid in found.items() if name in (EMBEDDING, HEAD)}

    per_row = {"group_size": 64, "bits": 8}  # a row of 64 channels
    assert section("w8pc", True) == {EMBEDDING: per_row}
    assert section("w8pc", False) == {EMBEDDING: per_row, HEAD: per_row}
    assert section("w4g32", False) == {}
    assert section("embedding only", False) == {EMBEDDING: per_row, HEAD: False}
    assert section("head only", False) == {HEAD: per_row}
    assert section("differ", False) == {HEAD: {"group_size": 64, "bits": 3}}


@pytest.mark.parametrize(("hidden", "group"), [(128, 128), (192, 64), (96, 32)])
def test_a_row_is_written_in_the_largest_groups_that_divide_it(hidden: int, group: int, tmp_path: Path) -> None:
    floats = families.write(
        transformers.LlamaConfig(**families.GATED | {"hidden_size": hidden, "tie_word_embeddings": True}),
        tmp_path / "float",
    )
    tiny.quantize(floats, tmp_path / "q", quant({"embedding": W8}))
    out = exported(tmp_path / "q", "mlx", tmp_path / "out")
    assert read_config(out)["quantization"][EMBEDDING] == {"group_size": group, "bits": 8}
    scales = tiny.stored(out)[f"{EMBEDDING}.scales"]
    assert scales.shape == (tiny.VOCABULARY, hidden // group)
    assert torch.equal(scales, scales[:, :1].expand_as(scales))


@pytest.mark.parametrize("model_type", mlx.BY_WEIGHT)
def test_mlx_refuses_tied_tables_of_models_whose_logits_are_computed_from_codes(
    model_type: str, tmp_path: Path
) -> None:
    values = families.GATED | {"tie_word_embeddings": True}
    if model_type == "llama4_text":
        values |= {"moe_layers": [], "intermediate_size_mlp": 96, "head_dim": 16}
    config = transformers.AutoConfig.for_model(model_type, **values)
    tiny.quantize(families.write(config, tmp_path / "float"), tmp_path / "q", quant({"embedding": W8}))
    words = rf"lm_head computes with the packed table {EMBEDDING} \(tied weights\), .*\(quant\.embedding: float\)"
    with pytest.raises(InputError, match=words):
        exported(tmp_path / "q", "mlx", tmp_path / "out")


# gguf

TABLES = {"token_embd.weight", "output.weight"}


def in_gguf(out: Path) -> dict[str, str]:
    """Return the type of each table in the file."""
    gguf = pytest.importorskip("gguf")
    tensors = gguf.GGUFReader(out / "model.gguf").tensors
    return {tensor.name: tensor.tensor_type.name for tensor in tensors if tensor.name in TABLES}


def file_type(out: Path) -> str:
    gguf = pytest.importorskip("gguf")
    number = gguf.GGUFReader(out / "model.gguf").fields["general.file_type"].contents()
    return str(gguf.LlamaFileType(number).name)


@pytest.mark.parametrize(
    ("grid", "tied", "types"),
    [
        ("w8pc", True, ("Q8_0",)),
        ("w8pc", False, ("Q8_0", "Q8_0")),
        ("w4g32", True, ("Q4_0",)),
        ("w4g32-asym", False, ("Q5_0", "Q5_0")),
        ("embedding only", False, ("Q8_0", "BF16")),
        ("head only", False, ("BF16", "Q8_0")),
        ("differ", False, ("Q4_0", "Q4_0")),
    ],
)
def test_gguf_holds_tables_in_the_smallest_type(
    grid: str, tied: bool, types: tuple[str, ...], native: Checkpoints, tmp_path: Path
) -> None:
    out = exported(native(grid, tied), "gguf", tmp_path / "out")
    assert in_gguf(out) == dict(zip(("token_embd.weight", "output.weight"), types, strict=False))
    assert file_type(out) == "MOSTLY_Q4_0"  # that of the linears, though the tables are larger


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in ("Q4_0", "Q8_0")])
def test_rows_of_256_channels_take_their_types(kind: str, tmp_path: Path) -> None:
    grid = ROWS[kind].model_dump(include={"num_bits", "group_size", "symmetric"})
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", quant({"embedding": grid}))
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    assert in_gguf(out) == {"token_embd.weight": kind}
    assert file_type(out) == "MOSTLY_Q4_0"


# refused, and said


G16, ASYMMETRIC = {"num_bits": 4, "group_size": 16}, {"num_bits": 8, "symmetric": False}
OF_MLX, OF_GGUF = "MLX multiplies groups of 32, 64 and 128", "blocks of GGUF have 32 or 256"
REGROUP = "give it a multiple of 32 as group_size, or leave it in floating point"
NO_ZERO = (
    "no type of GGUF holds 8 bits with a zero point exactly; quantize it with symmetric: true, or with at most 4 bits"
)


@pytest.mark.parametrize(
    ("name", "table", "grid", "words"),
    [
        (
            "mlx",
            EMBEDDING,
            G16,
            f"has groups of 16 input channels, and {OF_MLX}; {REGROUP}",
        ),
        ("mlx", HEAD, G16, f"has groups of 16 input channels, and {OF_MLX}; {REGROUP}"),
        ("gguf", EMBEDDING, G16, f"has groups of 16 input channels, and {OF_GGUF}; {REGROUP}"),
        ("gguf", HEAD, ASYMMETRIC, f"is w8pc asym, and {NO_ZERO}"),
        ("gguf", EMBEDDING, ASYMMETRIC, f"is w8pc asym, and {NO_ZERO}"),
    ],
)
def test_what_to_do_names_the_key_of_the_table_before_the_run_too(
    name: str, table: str, grid: dict[str, object], words: str, tmp_path: Path
) -> None:
    key = "embedding" if table == EMBEDDING else "head"
    floats, config = tiny.llama(tmp_path / "float", tied=table == EMBEDDING, blocks=1), quant({key: grid})
    export = ExportConfig(format=name, path=tmp_path / "out")
    loaded = tiny.load(floats)
    tables = select_tables(loaded, config)
    planned = PlannedCheckpoint(loaded, tables.specs, tables.shapes, tables)
    tiny.quantize(floats, tmp_path / "q", config)
    for source in (planned, NativeCheckpoint(tmp_path / "q")):
        assert _base.refusal(name, source, export) == f"{table} {words} (quant.{key})"


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [
        ("gguf", 1e-8, r"weight_scale has values that float16 does not hold; quantize with scale_dtype: float16"),
        ("mlx", 1e-38, r"weight_scale times a code is not exact in float32"),
    ],
)
def test_scales_of_tables_that_a_format_rounds_are_refused(
    name: str, factor: float, words: str, tmp_path: Path
) -> None:
    floats = tiny.llama(tmp_path / "float", tied=True, blocks=1)
    tiny.change(floats, **{f"{EMBEDDING}.weight": tiny.stored(floats)[f"{EMBEDDING}.weight"] * factor})
    tiny.quantize(floats, tmp_path / "q", quant({"embedding": W8, "scale_dtype": "bfloat16"}))
    with pytest.raises(InputError, match=rf"{EMBEDDING}\.{words}"):
        exported(tmp_path / "q", name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CARDS: list[tuple[str, Callable[[str], bool]]] = [
    ("gguf", lambda card: "4.50 bits per weight as written, 4.50 in the checkpoint: w4g32 as Q4_0 (4.5)" in card),
    ("gguf", lambda card: f"{EMBEDDING}: 8.50 bits per weight as written, 8.25 in the checkpoint: w8pc as" in card),
    ("gguf", lambda card: f"{HEAD}: 8.50 bits per weight as written, 8.25 in the checkpoint: w8pc as" in card),
    ("mlx", lambda card: "6.00 bits per weight as written: scales and biases are float32" in card),
    ("mlx", lambda card: f"{EMBEDDING}: 9.00 bits per weight as written" in card),
    ("mlx", lambda card: f"{HEAD}: 9.00 bits per weight as written" in card),
]


@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_the_card_counts_the_bits_of_tables_apart(name: str, native: Checkpoints, tmp_path: Path) -> None:
    card = (exported(native("w8pc", False), name, tmp_path / "out") / "README.md").read_text()
    assert all(said(card) for format, said in CARDS if format == name), card
