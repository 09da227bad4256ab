"""The models that llama.cpp computes as transformers does: their architectures there, what it reads, and refusals.

Each row says what llama.cpp's source (``src/models``, ``src/llama-model.cpp``) does for an architecture; the tests
load a model of each row in llama.cpp and compare its logits.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from qtool.exporters.gguf import figures, rotary
from qtool.exporters.gguf.figures import Figure

QKV, OUT, FEED_FORWARD = ("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "attn_norm_2", "ffn_norm", "output_norm")


class Family(NamedTuple):
    """llama.cpp's architecture for a ``model_type``, and what it does there."""

    architecture: str
    figures: tuple[Figure, ...] = figures.RMS_NORM
    """Metadata beside ``figures.COMMON``, or instead of figures there that have the same key."""
    rows: Literal["", "pairs", "groups", "tiles"] = ""
    """The order of rows. ``pairs``: the two channels of a rotary pair of query and key lie next to each other.
    ``groups``: in the fused tensor of query, key and value, the heads of each follow each other. ``tiles``: of linear
    attention, the value heads of a key head are not neighbours."""
    biases: tuple[str, ...] = ()
    """Tensors of a block whose biases are read."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Ways of scaling the rotary embedding that are computed."""
    partial: bool = False
    """True if a part of the channels of a head may rotate."""
    norm_offset: int = 0
    """What the model adds to the weights of its norms, and llama.cpp does not: the file holds the sum."""
    activation: str = "silu"
    head: Literal["", "own", "tied"] = ""
    """``own``: llama.cpp needs a head of its own; ``tied``: it always computes with the embedding's table."""
    windows: bool = False
    """True if blocks attend to a window of tokens where the model does."""
    needs: Mapping[str, Any] = MappingProxyType({})
    """Values that keys of the config must have, because llama.cpp computes nothing else. A callable returns the value,
    of the config."""
    required: tuple[str, ...] = ()
    """Keys that must have a number, because llama.cpp computes with a number of its own where a file has none."""


def _every(pattern: int) -> Any:
    return lambda config: [int((index + 1) % pattern != 0) for index in range(config.num_hidden_layers)]


def _scaled_by(big: int) -> Any:
    """Return the divisor of attention scores that Gemma's code in llama.cpp takes; ``big``: the blocks of the 27B."""
    return lambda config: (
        config.hidden_size // config.num_attention_heads if config.num_hidden_layers == big else rotary.head_dim(config)
    )


def _shared_blocks(config: Any) -> int:
    """Return the number of last blocks that may reuse keys and values in llama.cpp.

    It takes those of the last block that has its own for blocks that attend to all tokens, and of the block before it
    for blocks with a window.
    """
    count = int(config.num_kv_shared_layers)
    own = config.layer_types[: config.num_hidden_layers - count]
    return count if own[-2:] == ["sliding_attention", "full_attention"] else 0


# each block has experts
EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
LLAMA = Family(
    "llama", rows="pairs", biases=(*QKV, *OUT, *FEED_FORWARD), ropes=("default", "linear", "yarn", "llama3", "longrope")
)
GEMMA = Family(
    "gemma", norm_offset=1, activation="gelu_pytorch_tanh", head="tied", needs={"use_bidirectional_attention": False}
)
QWEN = Family("qwen2", biases=QKV)
QWEN_35 = Family(
    "qwen35",
    (*figures.RMS_NORM, *figures.DELTA_NET),
    rows="tiles",
    biases=("ssm_dt",),
    ropes=("default",),
    partial=True,
    norm_offset=1,
    needs={
        "linear_value_head_dim": lambda config: config.linear_key_head_dim,
        "layer_types": lambda config: figures.every(figures.interval(config), "linear_attention", config),
    },
)
LAYER_NORMS = Family("stablelm", figures.LAYER_NORM, biases=(*NORMS, *QKV), partial=True)
OLMO2 = Family("olmo2", head="own")
COHERE = Family(
    "command-r", (*figures.LAYER_NORM, *figures.LOGIT_SCALE), biases=QKV, head="tied", needs={"use_qk_norm": False}
)
GLM = Family("chatglm", biases=QKV, ropes=("default",), partial=True)
GRANITE = LLAMA._replace(architecture="granite", figures=(*figures.RMS_NORM, *figures.GRANITE))

FAMILIES = {  # by model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA._replace(figures=(*figures.RMS_NORM, *figures.EXPERTS)),
    "qwen2": QWEN,
    "qwen3": QWEN._replace(architecture="qwen3"),
    "qwen2_moe": QWEN._replace(
        architecture="qwen2moe",
        figures=(*figures.RMS_NORM, *figures.WIDE_EXPERTS, figures.SHARED),
        head="own",
        needs=EVERY_LAYER | {"norm_topk_prob": False, "qkv_bias": True},
    ),
    "qwen3_moe": QWEN._replace(
        architecture="qwen3moe",
        figures=(*figures.RMS_NORM, *figures.WIDE_EXPERTS),
        needs=EVERY_LAYER | {"norm_topk_prob": True},
    ),
    "qwen3_5_text": QWEN_35,
    "qwen3_5_moe_text": QWEN_35._replace(
        architecture="qwen35moe", figures=(*QWEN_35.figures, *figures.WIDE_EXPERTS, figures.SHARED)
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA._replace(
        architecture="gemma2",
        figures=(*figures.RMS_NORM, *figures.WINDOW, *figures.SOFTCAPS),
        windows=True,
        ropes=("default", "linear"),
        needs={"use_bidirectional_attention": False, "query_pre_attn_scalar": _scaled_by(46)},
        required=("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": GEMMA._replace(
        architecture="gemma3",
        figures=(*figures.RMS_NORM, *figures.WINDOW, *figures.SOFTCAPS[1:]),
        windows=True,
        ropes=("default", "linear"),
        head="",
        needs={
            "use_bidirectional_attention": False,
            "query_pre_attn_scalar": _scaled_by(62),
            "attn_logit_softcapping": None,
        },
    ),
    "gemma4_text": Family(
        "gemma4",
        (*figures.RMS_NORM, *figures.GEMMA_4),
        ropes=("proportional",),
        partial=True,
        activation="gelu_pytorch_tanh",
        windows=True,
        needs={
            "use_bidirectional_attention": "vision",  # as None, in a text
            "num_kv_shared_layers": _shared_blocks,
            "vocab_size_per_layer_input": lambda config: (
                config.vocab_size if config.hidden_size_per_layer_input else config.vocab_size_per_layer_input
            ),
        },
    ),
    "phi3": Family("phi3", ropes=("default", "linear", "longrope"), partial=True),
    "phi": LAYER_NORMS._replace(
        architecture="phi2",
        biases=(*NORMS, *QKV, *OUT, *FEED_FORWARD, "output"),
        activation="gelu_new",
        head="own",
        needs={"qk_layernorm": False},
    ),
    "smollm3": LLAMA._replace(
        architecture="smollm3", biases=QKV, ropes=("default", "linear", "yarn"), needs={"no_rope_layers": _every(4)}
    ),
    "olmo": Family("olmo", figures.OLMO, rows="pairs"),
    "olmo2": OLMO2,
    "olmo3": OLMO2._replace(figures=(*figures.RMS_NORM, *figures.WINDOW), windows=True, ropes=("default",)),
    "olmoe": Family(
        "olmoe", (*figures.RMS_NORM, *figures.EXPERTS), head="own", needs={"norm_topk_prob": False, "clip_qkv": None}
    ),
    "gpt2": Family(
        "gpt2",
        figures.LAYER_NORM,
        biases=("attn_norm", "ffn_norm", "output_norm", "attn_qkv", *OUT, *FEED_FORWARD),
        activation="gelu_new",
        needs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": Family(
        "gptneox",
        (*figures.LAYER_NORM, *figures.PARALLEL),
        rows="groups",
        biases=("attn_norm", "ffn_norm", "output_norm", "attn_qkv", *OUT, *FEED_FORWARD),
        partial=True,
        activation="gelu",
        head="own",
        needs={"attention_bias": True},
    ),
    "falcon": Family(
        "falcon",
        figures.LAYER_NORM,
        rows="groups",
        biases=NORMS,
        activation="gelu",
        needs={"alibi": False, "parallel_attn": True},
    ),
    "starcoder2": Family(
        "starcoder2",
        figures.LAYER_NORM,
        biases=(*NORMS, *QKV, *OUT, *FEED_FORWARD),
        activation="gelu_pytorch_tanh",
        needs={"use_bias": True},
    ),
    "stablelm": LAYER_NORMS._replace(head="own", needs={"qk_layernorm": False}),
    "nemotron": LAYER_NORMS._replace(
        architecture="nemotron",
        biases=(*NORMS, *QKV, *OUT, "ffn_up", "ffn_down"),
        norm_offset=1,
        activation="relu2",
        head="own",
    ),
    "cohere": COHERE,
    "cohere2": COHERE._replace(
        architecture="cohere2",
        figures=(*COHERE.figures, *figures.WINDOW),
        windows=True,
        ropes=("default",),
        needs={},
    ),
    "granite": GRANITE,
    "granitemoe": GRANITE._replace(architecture="granitemoe", figures=(*GRANITE.figures, *figures.EXPERTS)),
    "glm": GLM,
    "glm4": GLM._replace(architecture="glm4"),
    "exaone": Family("exaone"),
    "exaone4": Family(
        "exaone4",
        (*figures.RMS_NORM, *figures.WINDOW),
        windows=True,
        ropes=("default", "llama3"),
        needs={"sliding_window": lambda config: config.sliding_window if config.num_hidden_layers == 64 else None},
    ),
    "arcee": LLAMA._replace(
        architecture="arcee", biases=QKV, ropes=("default", "linear", "yarn", "llama3"), activation="relu2"
    ),
    "seed_oss": Family("seed_oss", biases=QKV),
    "ernie4_5": Family("ernie4_5", biases=(*QKV, *OUT)),
}


def metadata(config: Any) -> tuple[Figure, ...]:
    """Return the figures of a model in the metadata of its file."""
    own = FAMILIES[config.model_type].figures
    replaced = {figure.key for figure in own}
    return (*(figure for figure in figures.COMMON if figure.key not in replaced), *own)


def same_activation(found: str, computed: str) -> bool:
    """Return whether an activation is the ``computed`` one; llama.cpp has one GELU, by the hyperbolic tangent."""
    names = {"swish": "silu"} | dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"), "gelu")
    return names.get(found, found) == names.get(computed, computed)


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
    activation = figures.first(model, "hidden_activation", "hidden_act", "activation_function", "activation")
    if not same_activation(activation, family.activation):
        return (
            f"its activation is {activation}, and llama.cpp computes {family.activation} for {model.model_type}; "
            "export dense instead"
        )
    if family.head and (family.head == "tied") != bool(model.tie_word_embeddings):
        reads = "always computes with" if family.head == "tied" else "needs a head beside"
        return (
            f"its tie_word_embeddings is {model.tie_word_embeddings}, and llama.cpp {reads} the table of the "
            f"embedding for {model.model_type}; export dense instead"
        )
    for key, needed in family.needs.items():
        value, computed = getattr(model, key, None), needed(model) if callable(needed) else needed
        if value is not None and value != computed:
            return (
                f"its {key} is {value}, and llama.cpp computes {model.model_type} models with {computed}; "
                "export dense instead"
            )
    for key in family.required:
        if getattr(model, key, None) is None:
            return (
                f"its {key} is unset, and llama.cpp takes a number of its own for {model.model_type} models without "
                "one; export dense instead"
            )
    if any(figures.sliding(model)) and not family.windows:
        return (
            f"its layer_types has sliding_attention, and llama.cpp attends to all tokens for {model.model_type}; "
            "export dense instead"
        )
    return rotary.refuses(model, family.ropes, partial=family.partial)
