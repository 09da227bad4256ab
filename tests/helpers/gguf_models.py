"""Models of every family and rotary embedding that a GGUF file is written for, and grids for its types."""

from pathlib import Path

import transformers

from helpers import families, tiny
from qtool.config.quant import QuantConfig

ROPE = {"rope_theta": 500.0, "factor": 8.0}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("LlamaConfig", {"head_dim": 32}),
    "llama 3": ("LlamaConfig", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA_3}}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": True}),
}
MIX = {
    "num_bits": 4,
    "group_size": 32,
    "overrides": {
        "*.down_proj": {"num_bits": 8},
        "*.q_proj": {"num_bits": 3, "symmetric": False},
        "*.v_proj": {"num_bits": 2, "group_size": -1},
        "*.up_proj": {"symmetric": False},
        "*.1.mlp.gate_proj": {"skip": True},
    },
}
# GGUF type -> a grid that is stored in it when the rows are multiples of 256
ROWS = {
    "TQ2_0": QuantConfig(num_bits=2, group_size=-1),
    "Q2_K": QuantConfig(num_bits=2, group_size=256, symmetric=False),
    "Q3_K": QuantConfig(num_bits=3, group_size=256),
    "Q4_0": QuantConfig(num_bits=4, group_size=64),
    "Q4_K": QuantConfig(num_bits=4, group_size=-1, symmetric=False),
    "Q5_0": QuantConfig(num_bits=4, group_size=128, symmetric=False),
    "Q8_0": QuantConfig(num_bits=8, group_size=128),
}


def config(name: str, **changes: object) -> transformers.PreTrainedConfig:
    """Return the config of a model in ``CHANGES``, with further ``changes``."""
    kind, own = CHANGES[name]
    made: transformers.PreTrainedConfig = getattr(transformers, kind)(**(families.GATED | own | changes))
    return made


def quantized(name: str, at: Path, quant: dict[str, object] = MIX, **changes: object) -> Path:
    """Write a native checkpoint below ``at``; the default ``quant`` mixes bits, groups and symmetry."""
    floats = families.write(config(name, **changes), at / "float")
    tiny.quantize(floats, at / "q", QuantConfig.model_validate(quant))
    return at / "q"
