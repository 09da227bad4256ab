"""Configurations of tiny models of many families, and folders of random weights for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from helpers import tiny
from qtool.config.quant import QuantConfig

WINDOW = 8  # tokens of sliding attention; calibration windows have 24
# Any: a configuration's values are of many types
COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED = COMMON | {"intermediate_size": 96, "max_position_embeddings": 128, "num_key_value_heads": 2}  # GQA
ALL_HEADS = GATED | {"num_key_value_heads": 4}
LOCAL_AND_GLOBAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128, "init_std": 0.1}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GATED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", GATED | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", GATED | {"use_sliding_window": True} | LOCAL_AND_GLOBAL),
    "qwen3": ("Qwen3Config", GATED | {"head_dim": 32}),
    "gemma2": ("Gemma2Config", GATED | {"head_dim": 16} | LOCAL_AND_GLOBAL),
    "gemma3": ("Gemma3TextConfig", GATED | {"head_dim": 16} | LOCAL_AND_GLOBAL),
    "phi3": ("Phi3Config", GATED),
    "opt": ("OPTConfig", COMMON | OPT),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": 96, "max_position_embeddings": 128}),
    "gpt2": ("GPT2Config", COMMON | GPT2),
    "smollm": ("LlamaConfig", ALL_HEADS | {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", GATED | {"no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", ALL_HEADS),
    "falcon": ("FalconConfig", COMMON | {"multi_query": True, "parallel_attn": True}),
    "falcon_new": ("FalconConfig", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": (
        "FalconConfig",
        COMMON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
}
W4 = QuantConfig(num_bits=4, group_size=16)


def make_config(name: str) -> PreTrainedConfig:
    kind, values = CONFIGS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    config: PreTrainedConfig = getattr(transformers, kind)(**values)
    return config


def write(config: PreTrainedConfig, folder: Path) -> Path:
    """Save a random model and a tokenizer as Hugging Face does; norms and biases differ from their defaults."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
