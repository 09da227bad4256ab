"""Tiny random models of every architecture that a GGUF file is written for, as ``tests/architectures`` has them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from helpers import architectures, tiny
from qtool.config.quant import QuantConfig

LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.5 * i for i in range(8)]}
FOUR = {"num_hidden_layers": 4}
DELTA = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "head_dim": 64}
FOUR_LINEAR = FOUR | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
LOCAL_LINEAR = {
    "sliding_attention": LINEAR,
    "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}
GLOBAL = {"head_dim": 64, "num_key_value_heads": 1}
SCALE = {"query_pre_attn_scalar": 16}  # of heads of 16 channels


class Case(NamedTuple):
    """A row of ``tests/architectures``, and values of its configuration instead of the row's."""

    row: str
    changes: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "llama": Case("llama"),
    "llama, linear": Case("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": Case("llama", {"rope_parameters": YARN}),
    "llama 3": Case("llama", {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mixtral": Case("mixtral"),
    "qwen2": Case("qwen2", {"sliding_window": None, "use_sliding_window": False, "layer_types": None}),
    "qwen2, yarn": Case(
        "qwen2",
        {"sliding_window": None, "use_sliding_window": False, "layer_types": None, "rope_parameters": YARN},
    ),
    "qwen3": Case("qwen3"),
    "qwen2_moe": Case("qwen2_moe"),
    "qwen3_moe": Case("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_5": Case("qwen3_5_text", DELTA | FOUR_LINEAR),
    "qwen3_5, as many heads": Case("qwen3_5_text", DELTA | FOUR_LINEAR | {"linear_num_value_heads": 2}),
    "qwen3_5_moe": Case("qwen3_5_moe_text", DELTA),
    "gemma": Case("gemma"),
    "gemma2": Case("gemma2", SCALE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": Case("gemma3_text", SCALE),
    "gemma3, linear": Case(
        "gemma3_text",
        SCALE
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": LINEAR,
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4": Case("gemma4_text"),
    "gemma4, keys as values": Case(
        "gemma4_text",
        {
            "attention_k_eq_v": True,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "per_layer_config": {"1": GLOBAL, "3": GLOBAL},
        },
    ),
    "gemma4, shared": Case("gemma4_e"),
    "phi": Case("phi"),
    "phi3": Case("phi3"),
    "phi3, partial": Case("phi3_partial"),
    "phi3, longrope": Case("phi3", {"rope_parameters": LONG}),
    "phi3, longrope, long": Case("phi3", {"rope_parameters": LONG | {"original_max_position_embeddings": 32}}),
    "smollm3": Case("smollm3", FOUR | {"no_rope_layers": [1, 1, 1, 0]}),
    "olmo": Case("olmo"),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo3"),
    "olmoe": Case("olmoe"),
    "gpt2": Case("gpt2"),
    "gpt_neox": Case("gpt_neox"),
    "gpt_neox, serial": Case("gpt_neox", {"use_parallel_residual": False}),
    "falcon": Case("falcon"),
    "falcon, grouped": Case("falcon_new"),
    "falcon, all heads": Case("falcon", {"multi_query": False}),
    "starcoder2": Case("starcoder2"),
    "stablelm": Case("stablelm"),
    "stablelm, parallel": Case("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "nemotron": Case("nemotron"),
    "cohere": Case("cohere"),
    "cohere2": Case("cohere2"),
    "granite": Case("granite", {"logits_scaling": 3.0}),
    "granitemoe": Case("granitemoe", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}),
    "glm": Case("glm"),
    "glm4": Case("glm4"),
    "exaone": Case("exaone"),
    "exaone4": Case("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "arcee": Case("arcee"),
    "seed_oss": Case("seed_oss"),
    "ernie4_5": Case("ernie4_5"),
}


def model_type(name: str) -> str:
    """Return the model type of a case."""
    return architectures.architectures()[CASES[name].row].model_type


def make_config(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """Return the configuration of a case, with further ``changes``."""
    row, own = CASES[name]
    found = architectures.architectures()[row]
    config: PreTrainedConfig = CONFIG_MAPPING[found.model_type](**(found.values | dict(own) | dict(changes)))
    return config


def write(name: str, folder: Path) -> Path:
    """Save a random float32 model of a case and its tokenizer as Hugging Face does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name))
    architectures.move(model)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("layer_scalar"):  # Gemma 4's, of one
            buffer.mul_(torch.rand(1) + 0.5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def quantized(name: str, at: Path, **quant: object) -> Path:
    """Write a native checkpoint of a case below ``at``, of 8 bits by default; return its folder."""
    values = {"num_bits": 8, "group_size": 32} | quant
    tiny.quantize(write(name, at / "float"), at / "q", QuantConfig.model_validate(values))
    return at / "q"
