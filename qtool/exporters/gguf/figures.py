"""Figures of a model in the metadata of a GGUF file: keys, types, and where a config of transformers has them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from qtool.exporters.gguf import rotary

Kind = Literal["uint32", "float32", "bool", "string", "array"]


class Figure(NamedTuple):
    """A figure of a model in the metadata of its file."""

    key: str
    """Its key, without the prefix of the architecture."""
    kind: Kind
    value: Callable[[Any], Any]
    """Returns the figure, of a model's config; ``None`` if the file has no such key."""


def first(config: Any, *names: str) -> Any:
    """Return the value of the first of ``names`` that a config has and that is not ``None``; else ``None``."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _count(key: str, *names: str) -> Figure:
    return Figure(key, "uint32", lambda config: first(config, *names))


def _real(key: str, *names: str) -> Figure:
    return Figure(key, "float32", lambda config: first(config, *names))


def num_kv_heads(config: Any) -> int:
    """Return the number of heads of keys and values."""
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        return 1
    return int(first(config, "num_key_value_heads", "num_kv_heads", "num_attention_heads"))


def sliding(config: Any) -> list[bool]:
    """Return for each block whether it attends to a window of tokens only."""
    return [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]


def interval(config: Any) -> int:
    """Return the distance of blocks that attend to all tokens: the number of the first one."""
    kinds = config.layer_types
    return int(kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1)


def every(distance: int, other: str, config: Any) -> list[str]:
    """Return the kinds of blocks of which one in ``distance`` attends to all tokens, and others are ``other``."""
    return [other if (index + 1) % distance else "full_attention" for index in range(config.num_hidden_layers)]


def _sections(config: Any) -> list[int]:
    """Return the rotary pairs for time, height and width, which have the same position in a text."""
    return [*rotary.parameters(config).get("mrope_section", (11, 11, 10)), 0]


def _local_head_dim(config: Any) -> int:
    return rotary.head_dim(config, "sliding_attention")


def _widths(config: Any) -> list[int]:
    """Return the inner channels of each block of Gemma 4: twice as many where it has no keys and values of its own."""
    wide = [config.use_double_wide_mlp and mode == "reuse" for mode in config.kv_sharing_modes]
    return [config.intermediate_size * (2 if each else 1) for each in wide]


COMMON = (
    _count("context_length", "max_position_embeddings"),
    _count("embedding_length", "hidden_size"),
    _count("block_count", "num_hidden_layers"),
    Figure(
        "feed_forward_length",
        "uint32",
        lambda config: first(config, "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * config.hidden_size,
    ),
    _count("attention.head_count", "num_attention_heads"),
    Figure("attention.head_count_kv", "uint32", num_kv_heads),
    Figure("attention.key_length", "uint32", rotary.head_dim),
    Figure("attention.value_length", "uint32", rotary.head_dim),
    _count("vocab_size", "vocab_size"),
    *(Figure(key, kind, value) for key, kind, value in rotary.FIGURES),
)
RMS_NORM = (_real("attention.layer_norm_rms_epsilon", "rms_norm_eps", "layer_norm_epsilon"),)
LAYER_NORM = (
    _real("attention.layer_norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
)
OLMO = (
    Figure("attention.layer_norm_epsilon", "float32", lambda config: 1e-5),  # fixed in the model's code
    _real("attention.clamp_kqv", "clip_qkv"),
)
USED = _count("expert_used_count", "num_experts_per_tok")
EXPERTS = (_count("expert_count", "num_experts", "num_local_experts"), USED)
WIDE_EXPERTS = (*EXPERTS, _count("expert_feed_forward_length", "moe_intermediate_size"))
SHARED = _count("expert_shared_feed_forward_length", "shared_expert_intermediate_size")
WINDOW = (
    Figure(
        "attention.sliding_window", "uint32", lambda config: config.sliding_window if any(sliding(config)) else None
    ),
    Figure("attention.sliding_window_pattern", "array", lambda config: sliding(config) or None),
)
SOFTCAPS = (
    _real("attn_logit_softcapping", "attn_logit_softcapping"),
    _real("final_logit_softcapping", "final_logit_softcapping"),
)
GEMMA_4 = (  # llama.cpp needs all of them, and without the last one takes 30
    Figure("attention.head_count_kv", "array", lambda config: [num_kv_heads(each) for each in config.per_layer_config]),
    Figure("attention.key_length_swa", "uint32", _local_head_dim),
    Figure("attention.value_length_swa", "uint32", _local_head_dim),
    Figure("rope.dimension_count_swa", "uint32", _local_head_dim),
    Figure("feed_forward_length", "array", _widths),
    _count("attention.shared_kv_layers", "num_kv_shared_layers"),
    Figure("embedding_length_per_layer_input", "uint32", lambda config: config.hidden_size_per_layer_input or 0),
    _count("attention.sliding_window", "sliding_window"),
    *WINDOW[1:],
    Figure("final_logit_softcapping", "float32", lambda config: config.final_logit_softcapping or 0.0),
)
LOGIT_SCALE = (_real("logit_scale", "logit_scale"),)
GRANITE = (
    _real("attention.scale", "attention_multiplier"),
    _real("embedding_scale", "embedding_multiplier"),
    _real("residual_scale", "residual_multiplier"),
    _real("logit_scale", "logits_scaling"),
)
PARALLEL = (Figure("use_parallel_residual", "bool", lambda config: bool(config.use_parallel_residual)),)
DELTA_NET = (
    Figure("rope.dimension_sections", "array", _sections),
    Figure("full_attention_interval", "uint32", interval),
    _count("ssm.conv_kernel", "linear_conv_kernel_dim"),
    _count("ssm.state_size", "linear_key_head_dim"),
    _count("ssm.group_count", "linear_num_key_heads"),
    _count("ssm.time_step_rank", "linear_num_value_heads"),
    Figure("ssm.inner_size", "uint32", lambda config: config.linear_value_head_dim * config.linear_num_value_heads),
)
