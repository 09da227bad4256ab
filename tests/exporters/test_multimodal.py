"""Exports of multimodal models: readers find the language model packed, and the towers as they were."""

from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.architectures import write
from helpers.native_checkpoints import exported
from transformers import AutoModelForImageTextToText

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantConfig
from qtool.exporters import auto_round, compressed_tensors, gptq

W4 = QuantConfig(num_bits=4, group_size=32, scale_dtype="bfloat16")
FAST = ["qwen2_5_vl"]
NAMES = [*FAST, "qwen2_vl", "qwen3_vl", "qwen3_5_vl", "gemma3_vl", "llava_llama", "mistral3", "idefics3", "smolvlm"]


def native_of(name: str, folder: Path) -> Path:
    tiny.quantize(write(name, folder / "float"), folder / "native", W4)
    return folder / "native"


@pytest.mark.parametrize(
    "name", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in NAMES]
)
def test_transformers_reads_compressed_tensors_with_the_towers_as_they_were(name: str, tmp_path: Path) -> None:
    native = native_of(name, tmp_path)
    exported(native, "compressed-tensors", tmp_path / "ct")
    ours = AutoModelForImageTextToText.from_pretrained(native, dtype=torch.float32).eval()
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
    assert torch.equal(tiny.logits(theirs), tiny.logits(ours))
    found, packed = dict(theirs.named_parameters()), NativeCheckpoint(native).specs
    others = {key for key, _ in ours.named_parameters() if key.rpartition(".")[0] not in packed}
    assert any("vis" in key for key in others)
    assert all(torch.equal(found[key], ours.get_parameter(key)) for key in others)


def test_configs_name_float_linears_as_engines_and_as_transformers_call_them(tmp_path: Path) -> None:
    """transformers reads such a model's tensors under other names than it gives them in memory."""
    source = NativeCheckpoint(native_of("qwen2_5_vl", tmp_path))
    ignored = compressed_tensors.section(source)["ignore"]
    assert {"visual.merger.mlp.0", "model.visual.merger.mlp.0", "lm_head"} <= set(ignored)
    assert auto_round.section(source)["block_name_to_quantize"] == "model.language_model.layers,model.layers"


def test_a_float_linear_of_a_block_is_known_to_gptq_readers(tmp_path: Path) -> None:
    native = native_of("qwen3_5_vl", tmp_path)
    _, left = gptq.kinds(NativeCheckpoint(native))
    assert set(left.values()) >= {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}
