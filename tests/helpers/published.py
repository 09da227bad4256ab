"""Tiny models whose config.json says the rotary embedding as published models do, in the keys of transformers 4."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import families, tiny
from qtool.config.quant import QuantConfig

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}
NEOX = families.COMMON | {"intermediate_size": 96, "max_position_embeddings": 128}
# name -> (class of the config, its values, its rope_parameters, the keys that say the same in transformers 4)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama 3": (
        "LlamaConfig",
        families.GATED,
        {"rope_theta": 500.0, **LLAMA_3},
        {"rope_theta": 500.0, "rope_scaling": LLAMA_3},
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        families.GATED | families.LOCAL_AND_GLOBAL | {"head_dim": 16, "sliding_window_pattern": 2},
        {"full_attention": {"rope_theta": 5000.0, **LINEAR}, "sliding_attention": {"rope_theta": 50.0}},
        {"rope_theta": 5000.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
    ),
    "phi": (
        "PhiConfig",
        families.GATED | {"num_key_value_heads": 4},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.75},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.75},
    ),
    "phi 3": (
        "Phi3Config",
        families.GATED | {"original_max_position_embeddings": 32, "sliding_window": None},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.75, "rope_type": "longrope", **LONG},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **LONG}},
    ),
    "gpt neox": (
        "GPTNeoXConfig",
        NEOX,
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 500, "rotary_pct": 0.5},
    ),
    "own head": (
        "LlamaConfig",
        families.GATED | {"tie_word_embeddings": True},
        {"rope_theta": 500.0},
        {"rope_theta": 500.0},
    ),
}


def write(name: str, folder: Path, *, older: bool) -> Path:
    """Write the float model ``name``, in the keys of transformers 4 only if ``older``, else of transformers 5 only."""
    kind, values, rope, keys = MODELS[name]
    families.write(getattr(transformers, kind)(**values, rope_parameters=rope), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"):
        config.pop(key, None)  # attributes that a config class keeps beside rope_parameters
    if older:
        del config["rope_parameters"]
        config |= keys
        config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config))
    if older:
        change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    if name == "own head":
        tensors = load_file(folder / "model.safetensors")
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table + 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def quantized(name: str, at: Path, *, older: bool) -> Path:
    """Write a native checkpoint of the model ``name`` below ``at``."""
    floats = write(name, at / "float", older=older)
    tiny.quantize(floats, at / "q", QuantConfig(num_bits=4, group_size=32))
    return at / "q"
