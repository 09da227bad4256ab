"""``gguf``: every code in the smallest type that holds it exactly, as the ``gguf`` package and transformers read it."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gguf_models, tiny, vocabularies
from helpers.gguf_models import CHANGES, ROWS, quantized
from helpers.native_checkpoints import FLOAT32_SCALES, GRIDS, Natives, exported, negative, plain, read_back
from helpers.packed import WEIGHTS, Weight
from hypothesis import assume
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.exporters.gguf import blocks, families, tokenizer
from qtool.models.folders import read_config
from qtool.models.targets import select_targets
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError, RunError

gguf = pytest.importorskip("gguf")
exporter = import_module("qtool.exporters.gguf")
Q_PROJ = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Natives:
    return Natives(tmp_path_factory.mktemp("natives"))


def in_file(out: Path) -> dict[str, object]:
    """Return the type of each tensor in the file, by its name there."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}


def refusal(folder: Path, out: Path) -> str:
    with pytest.raises(InputError) as error:
        exported(folder, "gguf", out)
    assert not out.exists()
    return str(error.value)


# types


def test_the_sizes_of_blocks_are_those_of_the_package() -> None:
    for block in blocks.BLOCKS:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block.name]] == (block.length, block.num_bytes)
    assert [block.bits for block in blocks.BLOCKS] == sorted(block.bits for block in blocks.BLOCKS)


@WEIGHTS
def test_the_package_dequantizes_the_same_weight_or_no_type_is_chosen(weight: Weight) -> None:
    spec, columns = weight.quantized.spec, weight.dense.shape[1]
    block = blocks.choose(spec, columns)
    assert (block is None) == (spec.num_bits == 8 and not spec.symmetric)
    assume(block is not None)
    assert block is not None
    rows = blocks.pack(weight.quantized, block)
    found = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[block.name])
    assert torch.equal(torch.from_numpy(found), weight.dense)


@WEIGHTS
def test_every_type_that_says_it_holds_a_grid_does(weight: Weight) -> None:
    spec, columns = weight.quantized.spec, weight.dense.shape[1]
    group = columns // spec.num_groups(columns)
    for block in blocks.BLOCKS:
        if group % block.length == 0 and block.holds(spec):
            found = gguf.dequantize(blocks.pack(weight.quantized, block).numpy(), gguf.GGMLQuantizationType[block.name])
            assert torch.equal(torch.from_numpy(found), weight.dense), block.name


@pytest.mark.parametrize(
    ("bits", "symmetric", "short", "long"),
    [
        (2, True, "Q4_0", "TQ2_0"),
        (2, False, "Q4_0", "Q2_K"),
        (3, True, "Q4_0", "Q3_K"),
        (3, False, "Q4_0", "Q4_0"),
        (4, True, "Q4_0", "Q4_0"),
        (4, False, "Q5_0", "Q4_K"),
        (8, True, "Q8_0", "Q8_0"),
        (8, False, None, None),
    ],
)
def test_the_smallest_type_is_chosen(bits: int, symmetric: bool, short: str | None, long: str | None) -> None:
    for group, columns, name in [
        (32, 512, short),
        (96, 768, short),
        (256, 512, long),
        (-1, 512, long),
        (-1, 96, short),
    ]:
        spec = QuantSpec(num_bits=bits, group_size=group, symmetric=symmetric)
        chosen = blocks.choose(spec, columns)
        assert (None if chosen is None else chosen.name) == name, spec.label()
    assert blocks.choose(QuantSpec(num_bits=4, group_size=16), 512) is None


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_256_take_their_types_in_a_file_and_read_back(name: str, tmp_path: Path) -> None:
    tiny.quantize(tiny.BUILTIN, tmp_path / "q", ROWS[name])
    assert negative(tmp_path / "q") == ROWS[name].signed
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    kinds = in_file(out)
    assert {kinds[f"blk.{i}.{part}.weight"] for i in range(4) for part in ("attn_q", "ffn_down")} == {name}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == "F32"
    source, opened = NativeCheckpoint(tmp_path / "q"), _base.get("gguf").open(out)
    for linear in source.specs:
        assert torch.equal(_base.get("gguf").read(opened, linear), dequantize(*source.quantized(linear)))


# transformers' own reader of GGUF


def as_transformers_reads(out: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    return model


@pytest.mark.parametrize(
    "name", [name for name in CHANGES if "biases" not in name and "llama 3" not in name and "linear" not in name]
)
def test_transformers_reads_the_same_weights_and_logits_of_every_family(name: str, tmp_path: Path) -> None:
    folder = quantized(name, tmp_path)
    out = exported(folder, "gguf", tmp_path / "out")
    model, source = as_transformers_reads(out), NativeCheckpoint(folder)
    for linear in source.specs:
        assert torch.equal(model.get_parameter(f"{linear}.weight"), dequantize(*source.quantized(linear))), linear
    assert torch.equal(tiny.logits(model), tiny.logits(plain(folder)))


@pytest.mark.parametrize("grid", ["w2pc", "w3g32-asym", "w4g32-asym", "w8g32", "mixed", "skipped"])
def test_transformers_reads_the_same_logits_of_every_grid(grid: str, native: Natives) -> None:
    folder = native(grid)
    assert torch.equal(tiny.logits(as_transformers_reads(native.export("gguf", grid))), native.logits[folder])


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_transformers_reads_the_same_tokenizer(kind: str, native: Natives, tmp_path: Path) -> None:
    floats = tiny.copied(native.floats(), tmp_path / "float")
    ours = vocabularies.save(kind, floats)
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4g32"])
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert theirs(vocabularies.TEXT)["input_ids"] == ours(vocabularies.TEXT)["input_ids"]
    name = "default" if kind in ("sentencepiece", "gemma") else kind
    fields = {key: field.contents() for key, field in gguf.GGUFReader(out / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == name
    assert fields.get("tokenizer.ggml.add_space_prefix", False) == (kind == "sentencepiece")
    assert fields["tokenizer.ggml.add_bos_token"] == (kind in ("llama-bpe", "sentencepiece", "gemma", "gemma4"))
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert ("composes characters" in (out / "README.md").read_text()) == (kind in ("qwen2", "qwen35"))


# rows, frequencies, figures


def test_rows_and_biases_of_query_and_key_pair_neighbours_in_llama_only(tmp_path: Path) -> None:
    for family in ("llama with biases", "qwen2"):
        at = tmp_path / family
        folder = quantized(family, at)
        out = exported(folder, "gguf", at / "out")
        stored = {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}
        source = NativeCheckpoint(folder)
        # GGUF interleaves the rows of the two halves of each head of 16
        order = [16 * head + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
        order = order if family != "qwen2" else list(range(64))
        name = "model.layers.0.self_attn.q_proj"
        assert torch.equal(
            torch.from_numpy(np.array(stored["blk.0.attn_q.bias"].data)), source.tensor(f"{name}.bias")[order]
        )
        found = gguf.dequantize(stored[Q_PROJ].data, stored[Q_PROJ].tensor_type)
        assert torch.equal(torch.from_numpy(found), dequantize(*source.quantized(name))[order])


def test_llama_3_frequencies_are_divided_by_what_the_file_says(tmp_path: Path) -> None:
    out = exported(quantized("llama 3", tmp_path), "gguf", tmp_path / "out")
    stored = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(out / "model.gguf").tensors}
    frequencies = plain(tmp_path / "q").get_buffer("model.rotary_emb.inv_freq")
    exponents = torch.arange(0, 16, 2) / 16
    assert torch.allclose(500.0**-exponents / stored["rope_freqs.weight"], frequencies, rtol=1e-6)


def test_the_figures_of_a_model_are_in_the_file(tmp_path: Path) -> None:
    out = exported(quantized("qwen3", tmp_path), "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(out / "model.gguf")
    found = {key.removeprefix("qwen3."): field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "qwen3"
    assert {key: found.get(key) for key, *_ in families.metadata(gguf_models.config("qwen3")) if key in found} == {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.dimension_count": 128,
        "vocab_size": tiny.VOCABULARY,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.freq_base": 10000.0,
    }


def test_rows_of_the_embedding_without_a_token_are_unused(native: Natives, tmp_path: Path) -> None:
    out = native.export("gguf")
    fields = gguf.GGUFReader(out / "model.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    known = AutoTokenizer.from_pretrained(out)
    assert len(tokens) == tiny.VOCABULARY
    assert tokens[: len(known)] == known.convert_ids_to_tokens(list(range(len(known))))
    assert kinds[0] == tokenizer.CONTROL
    assert all((kind == tokenizer.UNUSED) == (index >= len(known)) for index, kind in enumerate(kinds))


def test_it_says_how_many_bits_were_written_and_how_to_need_fewer(native: Natives, tmp_path: Path) -> None:
    card = (native.export("gguf", "w2g32-asym") / "README.md").read_text()
    assert "4.50 bits per weight as written, 2.56 in the checkpoint: w2g32 asym as Q4_0 (4.5)" in card
    assert "2 and 3 bits fill 4.5 in Q4_0" in card
    assert "library_name: gguf" in card
    card = (native.export("gguf", "mixed") / "README.md").read_text()
    assert "w4g32 as Q4_0 (4.5), w2pc as Q4_0 (4.5), w8g32 as Q8_0 (8.5), w3g32 as Q4_0 (4.5)" in card
    assert "fill" not in (native.export("gguf", "w4g32") / "README.md").read_text()
    card = (
        exported(quantized("llama with biases", tmp_path / "b"), "gguf", tmp_path / "b" / "out") / "README.md"
    ).read_text()
    assert "transformers' own reader of GGUF leaves out biases" in card
    short = quantized("mistral", tmp_path, sliding_window=8)
    assert "this model over 8 tokens" in (exported(short, "gguf", tmp_path / "out") / "README.md").read_text()


# damage


def damaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Make the exporter change its file after it was written; ``change`` gets the untyped reader of ``gguf``."""

    def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
        notes: list[str] = original.write(source, out, config)
        change(gguf.GGUFReader(out / "model.gguf", "r+"))
        return notes

    original = exporter.EXPORTER
    monkeypatch.setattr(exporter, "EXPORTER", original._replace(write=write))


@pytest.mark.parametrize("name", [Q_PROJ, "blk.0.attn_norm.weight", "token_embd.weight", "output.weight"])
@pytest.mark.parametrize("byte", [0, 5])
def test_a_changed_byte_is_found(
    name: str, byte: int, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(reader: Any) -> None:
        data = next(t for t in reader.tensors if t.name == name).data
        data.view(np.uint8).reshape(-1)[byte] ^= 4

    damaged(monkeypatch, change)
    with pytest.raises(RunError, match="differs after export"):
        exported(native(), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["rope.freq_base", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_changed_figure_is_found(key: str, native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(reader: Any) -> None:
        field = reader.fields[f"llama.{key}"]
        field.parts[field.data[0]][0] *= 2

    damaged(monkeypatch, change)
    with pytest.raises(RunError, match=f"config.json differs after export, in {key}; the export was not kept"):
        exported(native(), "gguf", tmp_path / "out")


# refused


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            {"num_bits": 8, "symmetric": False},
            "q_proj is w8g32 asym, and no type of GGUF holds 8 bits with a zero point",
        ),
        (
            {"group_size": 16},
            "q_proj has groups of 16 input channels, and blocks of GGUF have 32 or 256; quantize with",
        ),
        (FLOAT32_SCALES, "weight_scale has values that float16 does not hold; quantize with scale_dtype"),
    ],
)
def test_grids_that_no_type_holds_are_refused_with_what_to_do(
    grid: dict[str, object], words: str, native: Natives, tmp_path: Path
) -> None:
    quant = QuantConfig.model_validate({"num_bits": 4, "group_size": 32} | grid)
    tiny.quantize(native.floats(), tmp_path / "q", quant)
    assert words in refusal(tmp_path / "q", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, and llama.cpp computes silu for llama"),
        (
            {"rope_parameters": {"rope_type": "dynamic", **gguf_models.ROPE}},
            "its rotary embedding is dynamic, and GGUF is written with default, linear, yarn, llama3, longrope",
        ),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(quantized("llama", tmp_path, **changes), tmp_path / "out")


def test_biases_are_refused_where_the_engine_does_not_read_them(tmp_path: Path) -> None:
    folder = quantized("qwen3", tmp_path, attention_bias=True)
    words = "llama.cpp does not read model.layers.0.self_attn.o_proj.bias of a qwen3 model; export dense instead"
    assert words in refusal(folder, tmp_path / "out")


def test_a_scaled_rotary_embedding_is_refused_where_the_engine_does_not_read_it(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", **gguf_models.ROPE, **gguf_models.LLAMA_3}
    folder = quantized("qwen2", tmp_path, rope_parameters=rope)
    words = "its rotary embedding is llama3, and GGUF is written with default, linear, yarn for qwen2"
    assert words in refusal(folder, tmp_path / "o")


def test_without_the_package_it_says_what_to_install(
    native: Natives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    assert 'pip install "qtool-llm[gguf]"' in refusal(native(), tmp_path / "out")


def test_it_is_refused_before_the_run(tmp_path: Path) -> None:
    from qtool.checkpoints.native import PlannedCheckpoint

    loaded = tiny.load(tiny.llama(tmp_path / "float"))
    targets = select_targets(loaded, QuantConfig(num_bits=8, group_size=32, symmetric=False))
    shapes = {target.name: (target.weight.shape[0], target.weight.shape[1]) for target in targets}
    planned = PlannedCheckpoint(loaded, {target.name: target.spec for target in targets}, shapes)
    reason = _base.refusal("gguf", planned, ExportConfig(format="gguf", path=tmp_path / "out"))
    assert reason is not None
    assert "symmetric: true" in reason


def test_eval_reads_a_file_that_was_made_of_tied_embeddings(tmp_path: Path) -> None:
    folder = quantized("qwen3, tied", tmp_path)
    out = exported(folder, "gguf", tmp_path / "out")
    assert "output.weight" not in in_file(out)
    assert read_config(out)["tie_word_embeddings"] is True
    logits: Tensor = read_back(out)
    assert torch.equal(logits, tiny.logits(plain(folder)))
