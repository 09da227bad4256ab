"""Configurations of tiny models whose blocks are of several kinds: recurrences, convolutions, attention, mixtures."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers.families import ALL_HEADS, COMMON, GATED

DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
CONV = {"layer_types": ["conv", "full_attention"]}
MAMBA2 = {  # 8 heads of 16 channels
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MIXED_MAMBA2 = GATED | MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]}
NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "use_mamba_kernels": False,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
JAMBA = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "mamba_d_state": 16,
    "use_mamba_kernels": False,
}
RECURRENT = {
    "num_hidden_layers": 3,
    "intermediate_size": 192,
    "lru_width": 64,
    "attention_window_size": 16,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "block_types": ["recurrent", "recurrent", "attention"],
}
# configuration class and values; models without mixtures, of which every linear of 32 rows or more is quantized
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", GATED | {"head_dim": 32} | DELTA),
    "olmo_hybrid": ("OlmoHybridConfig", ALL_HEADS | DELTA | {"linear_num_key_heads": 4}),
    "lfm2": ("Lfm2Config", GATED | CONV | {"block_auto_adjust_ff_dim": False}),
    "lfm3": ("Lfm3Config", GATED | CONV | {"head_dim": 32}),
    "falcon_h1": ("FalconH1Config", GATED | MAMBA2 | {"mamba_d_ssm": 128, "head_dim": 32}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        MIXED_MAMBA2 | {"num_local_experts": 0, "shared_intermediate_size": 96},
    ),
    "bamba": ("BambaConfig", GATED | MAMBA2 | {"attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronHConfig",
        {k: v for k, v in GATED.items() if k != "num_hidden_layers"} | NEMOTRON | {"head_dim": 32},
    ),
    "mamba": ("MambaConfig", COMMON | {"state_size": 16, "time_step_rank": 2}),
    "mamba2": (
        "Mamba2Config",
        COMMON | {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "jamba": ("JambaConfig", GATED | JAMBA),
    "recurrent_gemma": ("RecurrentGemmaConfig", COMMON | RECURRENT),
    "xlstm": ("xLSTMConfig", COMMON | {"hidden_size": 128, "num_blocks": 2, "num_heads": 4, "chunk_size": 16}),
}


def hybrid_config(name: str, others: dict[str, tuple[str, dict[str, Any]]] | None = None) -> PreTrainedConfig:
    """Return the configuration called ``name`` of ``HYBRIDS`` or of ``others``."""
    kind, values = (HYBRIDS | (others or {}))[name]
    config: PreTrainedConfig = getattr(transformers, kind)(**values)
    return config


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose output depends on every weight: no vector has its default, and no matrix is nearly zero."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.dim() == 2 and float(parameter.std()) < 0.05:
            parameter.mul_(5)
    return model
