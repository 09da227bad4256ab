"""Tiny random models whose memory of a text is of many kinds: KV caches, states, or none."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from helpers import tiny
from helpers.families import COMMON, make_config
from qtool.models.loaded import LoadedModel

MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
RECURRENT = {"lru_width": 64, "attention_window_size": 16, "num_key_value_heads": 1, "head_dim": 16}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # configs without attention heads; xLSTM has a cache of its own class
    "mamba": ("MambaConfig", COMMON | {"state_size": 16}),
    "mamba2": ("Mamba2Config", COMMON | MAMBA2),
    "xlstm": ("xLSTMConfig", COMMON | {"hidden_size": 128, "num_blocks": 2, "num_heads": 4, "chunk_size": 16}),
    "openai-gpt": ("OpenAIGPTConfig", {"vocab_size": tiny.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    # no cache, and caches with which transformers 5.24 computes something else
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        COMMON | RECURRENT | {"num_hidden_layers": 3, "intermediate_size": 192},
    ),
    "rwkv": ("RwkvConfig", COMMON | {"attention_hidden_size": 64, "context_length": 64}),
}
WITHOUT = {  # models whose text must be written without a cache
    "openai-gpt",
    "recurrent_gemma",
    "rwkv",
}


def make(name: str) -> LoadedModel:
    """Return a model that was never saved: one of ``OTHERS``, or of ``families.CONFIGS``."""
    config: PreTrainedConfig
    if name in OTHERS:
        kind, values = OTHERS[name]
        config = getattr(transformers, kind)(**values)
    else:
        config = make_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif float(parameter.std()) < 0.05:
            parameter.mul_(5)
    dtypes = {key: torch.float32 for key, _ in model.named_parameters()}
    return LoadedModel(model, tiny.tokenizer(), name, Path(), dtypes)
