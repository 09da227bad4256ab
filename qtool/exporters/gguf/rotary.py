"""Rotary embeddings in a GGUF file: base, channels and scaling, as metadata or as tensors of factors.

llama.cpp divides all frequencies by one factor (linear), interpolates between that and none (YaRN), or divides each by
a factor from a tensor (Llama 3, LongRoPE, and Gemma 4's proportional embedding, of which a part of the pairs rests).
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BETAS = {"beta_fast": 32, "beta_slow": 1}  # YaRN's; llama.cpp reads others for few architectures
AT_REST = 1e30  # divisor of the frequency of a pair that does not rotate


def head_dim(config: Any, layers: str = "full_attention") -> int:
    """Return the number of channels of an attention head, in ``layers`` of that kind if kinds differ."""
    if config.is_heterogeneous:  # transformers then refuses to give one value
        kinds = dict(zip(config.layer_types, config.per_layer_config, strict=True))
        config = kinds.get(layers, config.per_layer_config[-1])
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding of a config, of blocks that attend to all tokens; empty if there is none."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    own: dict[str, Any] = found.get("full_attention", found)
    return own


def kind(config: Any) -> str:
    """Return the way of scaling, as transformers names it: ``default`` is none."""
    return str(parameters(config).get("rope_type", "default"))


def num_channels(config: Any) -> int:
    """Return the number of channels of a head that rotate, or that a tensor of factors says not to."""
    if kind(config) == "proportional":
        return head_dim(config)
    return int(head_dim(config) * parameters(config).get("partial_rotary_factor", 1))


def _count(config: Any) -> int | None:
    return num_channels(config) if parameters(config) else None


def _local_base(config: Any) -> float | None:
    found = getattr(config, "rope_parameters", None) or {}
    return found["sliding_attention"]["rope_theta"] if "sliding_attention" in found else None


def _scaling(config: Any) -> str | None:
    return kind(config) if kind(config) in ("linear", "yarn", "longrope") else None


def _factor(config: Any) -> float | None:
    return parameters(config)["factor"] if kind(config) in ("linear", "yarn") else None


def original_length(config: Any) -> int | None:
    """Return the length of text that the embedding was made for before it was scaled, if a file names it."""
    if kind(config) not in ("yarn", "longrope"):
        return None
    found = parameters(config).get("original_max_position_embeddings")
    return int(found or config.max_position_embeddings)


def _magnitude(config: Any) -> float | None:
    """Return the factor of rotated channels, beside the one that llama.cpp computes of YaRN's factor by itself."""
    if kind(config) not in ("yarn", "longrope"):
        return None
    _, magnitude = ROPE_INIT_FUNCTIONS[kind(config)](config, device="cpu")
    own = 0.1 * math.log(parameters(config)["factor"]) + 1 if kind(config) == "yarn" else 1.0
    return None if math.isclose(magnitude, own) else float(magnitude / own)


FIGURES: tuple[tuple[str, Any, Any], ...] = (  # key, type, value of a config
    ("rope.dimension_count", "uint32", _count),
    ("rope.freq_base", "float32", lambda config: parameters(config).get("rope_theta")),
    ("rope.freq_base_swa", "float32", _local_base),
    ("rope.scaling.type", "string", _scaling),
    ("rope.scaling.factor", "float32", _factor),
    ("rope.scaling.original_context_length", "uint32", original_length),
    ("rope.scaling.attn_factor", "float32", _magnitude),
)


def tensors(config: Any) -> dict[str, Tensor]:
    """Return the divisors of the frequencies, float32 ``[channels / 2]``, by the name of their tensor in the file."""
    found = parameters(config)
    if kind(config) == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(found[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    if kind(config) not in ("llama3", "proportional"):
        return {}
    layers = "full_attention" if "full_attention" in config.rope_parameters else None
    scaled, _ = ROPE_INIT_FUNCTIONS[kind(config)](config, device="cpu", layer_type=layers)
    exponents = torch.arange(0, num_channels(config), 2, dtype=torch.int64).float() / num_channels(config)
    return {"rope_freqs.weight": (torch.pow(found["rope_theta"], -exponents) / scaled).clamp(max=AT_REST)}


def refuses(config: Any, known: tuple[str, ...], *, partial: bool) -> str | None:
    """Return the reason why llama.cpp would rotate otherwise, or ``None``.

    ``known`` are the ways of scaling that it computes for the architecture; ``partial``: it may rotate a part of the
    channels.
    """
    found = parameters(config)
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        return (
            f"its rotary embedding is {local} in sliding_attention, and llama.cpp does not scale it there for "
            f"{config.model_type}; export dense instead"
        )
    if kind(config) not in known:
        return (
            f"its rotary embedding is {kind(config)}, and GGUF is written with {', '.join(known)} for "
            f"{config.model_type}; export dense instead"
        )
    if found.get("partial_rotary_factor", 1) != 1 and not partial:
        return (
            f"it rotates a part of the channels of a head (partial_rotary_factor), and llama.cpp rotates all for "
            f"{config.model_type}; export dense instead"
        )
    if kind(config) == "yarn":
        for key, needed in (*BETAS.items(), ("truncate", True)):
            if found.get(key) not in (None, needed):
                return (
                    f"{key} of its rotary embedding is {found[key]}, and llama.cpp computes YaRN with {needed} for "
                    f"{config.model_type}; export dense instead"
                )
    return None
