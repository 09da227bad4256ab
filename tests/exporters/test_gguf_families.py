"""Every architecture in a GGUF file: its tensors and metadata, and the same logits in llama.cpp and transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exporters.test_witnesses import logits_of_llama_cpp
from helpers import gguf_families, tiny, vocabularies
from helpers.gguf_families import CASES
from helpers.native_checkpoints import GRIDS, exported, plain
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.exporters.gguf import families
from qtool.quant.affine import dequantize

gguf = pytest.importorskip("gguf")
ACTIVATIONS = 0.05  # relative error of logits where llama.cpp rounds inputs of linears to 8 bits
MORE = 0.15  # the same, where a token may get another expert, a state adds up errors, or scores are not scaled down
FLOATS = 1e-5  # relative error of logits in float32: sums in another order
GELU = 2e-3  # the same, where llama.cpp takes GELU from a table of float16


def stored(out: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in float32, by the names that it has."""
    tensors = gguf.GGUFReader(out / "model.gguf").tensors
    return {each.name: torch.from_numpy(np.array(gguf.dequantize(each.data, each.tensor_type))) for each in tensors}


def test_every_family_has_a_case() -> None:
    assert set(map(gguf_families.model_type, CASES)) == families.FAMILIES.keys()


def heads(numbers: list[int], size: int) -> list[int]:
    """Return the rows of heads of ``size`` channels, by the numbers of the heads."""
    return [number * size + channel for number in numbers for channel in range(size)]


# tensor of a case, and its rows in the order of the file: of heads of 16 channels, or of 32 in linear attention
ORDERS = {
    ("granite", "blk.0.attn_k", "model.layers.0.self_attn.k_proj"): [
        head * 16 + half * 8 + pair for head in range(2) for pair in range(8) for half in range(2)
    ],
    ("cohere", "blk.0.attn_k", "model.layers.0.self_attn.k_proj"): list(range(32)),
    ("gpt_neox", "blk.0.attn_qkv", "gpt_neox.layers.0.attention.query_key_value"): heads(
        [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11], 16
    ),
    ("falcon, grouped", "blk.0.attn_qkv", "transformer.h.0.self_attention.query_key_value"): heads(
        [0, 1, 4, 5, 2, 6, 3, 7], 16
    ),
    ("gpt2", "blk.0.attn_qkv", "transformer.h.0.attn.c_attn"): list(range(192)),
    ("phi3", "blk.0.attn_qkv", "model.layers.0.self_attn.qkv_proj"): list(range(128)),
    ("qwen3_5", "blk.0.attn_qkv", "model.layers.0.linear_attn.in_proj_qkv"): heads([0, 1, 2, 3, 4, 6, 5, 7], 32),
}


@pytest.mark.parametrize(("name", "there", "linear"), ORDERS)
def test_rows_of_codes_and_scales_are_in_the_order_of_the_engine(
    name: str, there: str, linear: str, tmp_path: Path
) -> None:
    folder = gguf_families.quantized(name, tmp_path)
    found = stored(exported(folder, "gguf", tmp_path / "out"))[f"{there}.weight"]
    assert torch.equal(found, dequantize(*NativeCheckpoint(folder).quantized(linear))[ORDERS[name, there, linear]])


@pytest.mark.parametrize("name", ["gemma3", "nemotron", "olmo2"])
def test_norms_hold_what_the_model_multiplies_by(name: str, tmp_path: Path) -> None:
    folder = gguf_families.quantized(name, tmp_path)
    found = stored(exported(folder, "gguf", tmp_path / "out"))["output_norm.weight"]
    weight = NativeCheckpoint(folder).tensor("model.norm.weight")
    assert torch.equal(found, weight if name == "olmo2" else weight + 1)


def test_input_channels_of_linear_attention_move_by_heads(tmp_path: Path) -> None:
    folder = gguf_families.quantized("qwen3_5", tmp_path)
    found = stored(exported(folder, "gguf", tmp_path / "out"))["blk.0.ssm_out.weight"]
    weight = dequantize(*NativeCheckpoint(folder).quantized("model.layers.0.linear_attn.out_proj"))
    assert torch.equal(found, weight[:, heads([0, 2, 1, 3], 32)])


def test_factors_of_gemma_4_are_in_the_file(tmp_path: Path) -> None:
    folder = gguf_families.quantized("gemma4", tmp_path)
    found, source = stored(exported(folder, "gguf", tmp_path / "out")), NativeCheckpoint(folder)
    for block in range(4):
        scalar = source.tensor(f"model.layers.{block}.layer_scalar")
        assert float(scalar) != 1
        assert torch.equal(found[f"blk.{block}.layer_output_scale.weight"], scalar.float())
    # of 16 rotary pairs of heads of 32 channels, a quarter rotates
    assert torch.allclose(found["rope_freqs.weight"], torch.tensor([1.0] * 4 + [1e30] * 12))


FIGURES: dict[str, dict[str, object]] = {
    "gemma2": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, False],
    },
    "gemma3, linear": {"rope.freq_base": 500.0, "rope.freq_base_swa": 100.0, "rope.scaling.factor": 4.0},
    "gemma4": {
        "attention.key_length": 32,
        "attention.key_length_swa": 16,
        "rope.dimension_count": 32,
        "rope.dimension_count_swa": 16,
        "feed_forward_length": [96, 96, 96, 96],
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": 0.0,
    },
    "gemma4, keys as values": {"attention.head_count_kv": [2, 1, 2, 1], "final_logit_softcapping": 3.0},
    "gemma4, shared": {
        "attention.shared_kv_layers": 2,
        "feed_forward_length": [96, 96, 192, 192],
        "embedding_length_per_layer_input": 32,
    },
    "llama, yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    },
    "falcon": {"attention.head_count_kv": 1, "feed_forward_length": 256},
    "stablelm": {"rope.dimension_count": 4},
    "granite": {"embedding_scale": 12.0, "logit_scale": 3.0},
    "qwen3_5": {"full_attention_interval": 4, "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 128},
    "gpt2": {"context_length": 128, "rope.freq_base": None},
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_figures_of_an_architecture_are_in_the_file(name: str, tmp_path: Path) -> None:
    out = exported(gguf_families.quantized(name, tmp_path), "gguf", tmp_path / "out")
    prefix = families.FAMILIES[gguf_families.model_type(name)].architecture
    fields = gguf.GGUFReader(out / "model.gguf").fields
    found = {key: fields.get(f"{prefix}.{key}") for key in FIGURES[name]}
    assert {key: field and field.contents() for key, field in found.items()} == FIGURES[name]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "its query_pre_attn_scalar is 64, and llama.cpp computes"),
        ("gemma2", {"final_logit_softcapping": None}, "its final_logit_softcapping is unset, and llama.cpp takes"),
        ("olmo2", {"tie_word_embeddings": True}, "llama.cpp needs a head beside the table of the embedding for olmo2"),
        (
            "gemma",
            {"tie_word_embeddings": False},
            "llama.cpp always computes with the table of the embedding for gemma",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "its no_rope_layers is [1, 0, 1, 0], and llama.cpp computes"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "llama.cpp attends to all tokens for qwen2"),
        ("llama", {"rope_parameters": gguf_families.YARN | {"beta_fast": 8}}, "llama.cpp computes YaRN with 32"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "its use_bidirectional_attention is all, and llama.cpp"),
        ("gemma4, shared", {"num_kv_shared_layers": 1}, "its num_kv_shared_layers is 1, and llama.cpp computes"),
        ("gemma4, shared", {"vocab_size_per_layer_input": 300}, "its vocab_size_per_layer_input is 300, and llama.cpp"),
        ("gemma4", {"rope_parameters": gguf_families.LOCAL_LINEAR}, "its rotary embedding is linear in sliding_att"),
        ("stablelm", {"qk_layernorm": True}, "its qk_layernorm is True, and llama.cpp computes stablelm"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, changes: dict[str, object], words: str) -> None:
    config = gguf_families.make_config(name, changes)
    assert words in str(families.refuses(config))
    assert families.refuses(gguf_families.make_config(name)) is None


def relative(folder: Path, witness: dict[str, Tensor]) -> float:
    """Return the error of a witness's logits, relative to ours, as a ratio of norms."""
    with torch.no_grad():
        ours = plain(folder)(witness["tokens"]).logits
    return float((witness["logits"] - ours).norm() / ours.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    folder = gguf_families.quantized(name, tmp_path)
    out = exported(folder, "gguf", tmp_path / "out")
    more = "moe" in name or name == "mixtral" or name.startswith(("qwen3_5", "gemma4"))
    tolerance = MORE if more else ACTIVATIONS
    assert relative(folder, logits_of_llama_cpp(out)) < tolerance
    activation = families.FAMILIES[gguf_families.model_type(name)].activation
    tolerance = GELU if activation.startswith("gelu") else FLOATS
    assert relative(folder, logits_of_llama_cpp(out, float32=True)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_llama_cpp_reads_texts_as_the_same_tokens(kind: str, tmp_path: Path) -> None:
    floats = tiny.copied(tiny.BUILTIN, tmp_path / "float")
    ours = vocabularies.save(kind, floats)
    tiny.quantize(floats, tmp_path / "q", GRIDS["w4g32"])
    out = exported(tmp_path / "q", "gguf", tmp_path / "out")
    witness = logits_of_llama_cpp(out, texts=vocabularies.TEXTS)
    for index, text in enumerate(vocabularies.TEXTS):
        assert witness[f"text_{index}"].tolist() == ours(text)["input_ids"], text
