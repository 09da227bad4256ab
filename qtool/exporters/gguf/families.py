"""The models that llama.cpp computes as transformers does: their architectures there, their metadata, and refusals."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A figure of a model in the metadata of its file."""

    key: str
    """Its key, without the prefix of the architecture."""
    integer: bool
    value: Callable[[Any], float]
    """Returns the figure, of a model's config."""


class Family(NamedTuple):
    """llama.cpp's architecture for a ``model_type``, and what it does there."""

    architecture: str
    interleaved: bool = False
    """True if the two channels of a rotary pair lie next to each other."""
    optional: bool = False
    """True if llama.cpp reads optional tensors: biases of linears, and divisors of the rotary frequencies."""
    experts: tuple[Figure, ...] = ()
    """Metadata of a mixture of experts."""
    needs: tuple[tuple[str, Any], ...] = ()
    """Values that keys of the config must have, because llama.cpp computes nothing else."""


def head_dim(config: Any) -> int:
    """Return the number of channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


COMMON = (
    Figure("context_length", True, lambda config: config.max_position_embeddings),
    Figure("embedding_length", True, lambda config: config.hidden_size),
    Figure("block_count", True, lambda config: config.num_hidden_layers),
    Figure("feed_forward_length", True, lambda config: config.intermediate_size),
    Figure("attention.head_count", True, lambda config: config.num_attention_heads),
    Figure("attention.head_count_kv", True, lambda config: config.num_key_value_heads),
    Figure("attention.key_length", True, head_dim),
    Figure("attention.value_length", True, head_dim),
    Figure("rope.dimension_count", True, head_dim),
    Figure("vocab_size", True, lambda config: config.vocab_size),
    Figure("attention.layer_norm_rms_epsilon", False, lambda config: config.rms_norm_eps),
    Figure("rope.freq_base", False, lambda config: config.rope_parameters["rope_theta"]),
)
USED = Figure("expert_used_count", True, lambda config: config.num_experts_per_tok)
MIXTRAL = (Figure("expert_count", True, lambda config: config.num_local_experts), USED)
QWEN = (
    Figure("expert_count", True, lambda config: config.num_experts),
    USED,
    Figure("expert_feed_forward_length", True, lambda config: config.moe_intermediate_size),
)
SHARED = Figure("expert_shared_feed_forward_length", True, lambda config: config.shared_expert_intermediate_size)
# each block has experts
EVERY_LAYER: tuple[tuple[str, Any], ...] = (("decoder_sparse_step", 1), ("mlp_only_layers", []))

FAMILIES = {  # by model_type
    "llama": Family("llama", interleaved=True, optional=True),
    "mistral": Family("llama", interleaved=True, optional=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mixtral": Family("llama", interleaved=True, optional=True, experts=MIXTRAL),
    "qwen2_moe": Family(
        "qwen2moe", experts=(*QWEN, SHARED), needs=(*EVERY_LAYER, ("norm_topk_prob", False), ("qkv_bias", True))
    ),
    "qwen3_moe": Family("qwen3moe", experts=QWEN, needs=(*EVERY_LAYER, ("norm_topk_prob", True))),
}


def metadata(config: Any) -> tuple[Figure, ...]:
    """Return the figures of a model in the metadata of its file."""
    return COMMON + FAMILIES[config.model_type].experts


def refuses(model: Any) -> str | None:
    """Return the reason why llama.cpp would compute something else with the same weights, or ``None``.

    ``model`` is the config of a model.
    """
    if model.model_type not in FAMILIES:
        return (
            f"its model_type is {model.model_type}, and qtool writes GGUF for {', '.join(FAMILIES)}; "
            "export dense, and convert the result with llama.cpp's convert_hf_to_gguf.py"
        )
    family = FAMILIES[model.model_type]
    if model.hidden_act not in ("silu", "swish"):
        return (
            f"its activation is {model.hidden_act}, and llama.cpp computes SiLU for {model.model_type}; "
            "export dense instead"
        )
    if getattr(model, "attention_bias", False) and not family.optional:
        return f"its attention has biases, which llama.cpp does not read for {model.model_type}; export dense instead"
    for key, needed in family.needs:
        value = getattr(model, key, None)
        if value is not None and value != needed:
            return (
                f"its {key} is {value}, and llama.cpp computes {model.model_type} models with {needed}; "
                "export dense instead"
            )
    rope = model.rope_parameters
    kind = rope.get("rope_type", "default")
    known = ("default", "linear", "llama3") if family.optional else ("default",)
    if kind not in known or rope.get("partial_rotary_factor", 1) != 1:
        return (
            f"its rotary embedding is {kind}, and GGUF is written with {', '.join(known)} for {model.model_type}; "
            "export dense instead"
        )
    return None
