"""What transformers leaves out where it makes a config of the metadata of a GGUF file.

Its reader maps a list of keys for each architecture, and takes the defaults of the config's class for all others. The
keys and tensors that change what the model computes are read here, for the architectures of ``READ``, of which
``tests/models/test_gguf_sources.py`` shows that a model which is written and read back computes the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool.models.gguf_header import Header
from qtool.system.errors import InputError

FREQUENCIES = "rope_freqs.weight"  # name of the tensor that divides the rotary frequencies
# what Llama 3.1 and later scale by; only their product with the original length is in the tensor of divisors
LOW, HIGH = 1.0, 4.0
LOCAL_BASE = 10_000.0  # of the rotary embedding in Gemma 3's blocks with a window, where the file names none
SCALING = ("type", "factor", "original_context_length", "finetuned")  # known keys of rope.scaling


KEYS = {  # keys of a config, and the keys of the metadata that have their values
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def completed(config: PreTrainedConfig, header: Header, read: Callable[[str], Tensor]) -> PreTrainedConfig:
    """Return the config of the model of a file, with what transformers has not read; ``read`` returns a tensor.

    Raises:
        InputError: the architecture is not in ``READ``, or the file has a rotary embedding that is not known.
    """
    if header.architecture not in READ:
        raise InputError(
            f"its architecture is {header.architecture!r}, and those that are read are {', '.join(READ)}; use the "
            "model's own folder with safetensors"
        )
    changes = {name: header.get(key) for name, key in KEYS.items() if hasattr(config, name)}
    changes |= READ[header.architecture](config, header)
    found = _changed(config, {name: value for name, value in changes.items() if value is not None})
    return _changed(found, {"rope_parameters": _rope(found, header, read)})


def _changed(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    made: PreTrainedConfig = type(config).from_dict(config.to_dict() | changes)
    return made


def _rope(config: Any, header: Header, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return the rotary embedding of the file.

    Raises:
        InputError: it is scaled in a way that is not known.
    """
    rope: dict[str, Any] = config.rope_parameters
    inner = dict(rope.get("full_attention", rope))  # Gemma 3 scales that of blocks that attend to all tokens
    if base := header.get("rope.freq_base"):
        inner["rope_theta"] = base
    kind = header.get("rope.scaling.type")
    if any(tensor.name == FREQUENCIES for tensor in header.tensors):
        inner |= _llama_3(config, read(FREQUENCIES))
    elif kind in ("linear", "yarn"):
        inner |= {"rope_type": kind, "factor": header.get("rope.scaling.factor")}
        if length := header.get("rope.scaling.original_context_length"):
            inner["original_max_position_embeddings"] = length
    elif kind not in (None, "none"):
        raise InputError(f"its rotary embedding is scaled as {kind!r}; linear, yarn and Llama 3's are read")
    prefix = f"{header.architecture}.rope.scaling."
    keys = {key.removeprefix(prefix) for key in header.metadata if key.startswith(prefix)}
    if odd := sorted(keys - set(SCALING)):
        raise InputError(f"its rotary embedding is scaled with {odd[0]} (rope.scaling), which is not read")
    if "full_attention" not in rope:
        return inner
    local = rope["sliding_attention"] | {"rope_theta": header.get("rope.freq_base_swa") or LOCAL_BASE}
    return {"full_attention": inner, "sliding_attention": local}


def _llama_3(config: PreTrainedConfig, divisors: Tensor) -> dict[str, Any]:
    """Return the parameters of Llama 3's embedding that divides each frequency by one of ``divisors`` ``[pairs]``.

    transformers divides frequencies with less than ``LOW`` periods in the original length by the factor, leaves those
    with more than ``HIGH``, and interpolates between: 1 / divisor = (1 - s) / factor + s with
    s = (periods - LOW) / (HIGH - LOW). So a divisor between tells the original length.

    Raises:
        InputError: no original length gives these divisors.
    """
    base: Any = config
    theta, pairs = base.rope_parameters["rope_theta"], len(divisors)
    waves = 2 * math.pi * theta ** (torch.arange(pairs, dtype=torch.float64) / pairs)
    factor = round(float(divisors.max()), 4)  # float32 divided it once
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    smooth = (1 / divisors.double() - 1 / factor) / (1 - 1 / factor)
    periods = smooth * (HIGH - LOW) + LOW
    lengths = (periods * waves)[between] if between.any() else waves[divisors > 1 + 1e-4][:1]
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": round(float(lengths.median())) if len(lengths) else 0,
    }
    made = _changed(config, {"rope_parameters": base.rope_parameters | found})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](made, device="cpu")
    if not torch.allclose(1 / waves / (scaled.double() / (2 * math.pi)), divisors.double(), rtol=1e-4):
        raise InputError("its rotary embedding has divisors (rope_freqs) that are not Llama 3's, which are read")
    return found


def _llama(config: Any, header: Header) -> dict[str, Any]:
    if header.get("expert_count"):
        raise InputError("it is a mixture of experts of the architecture llama, and mixtures that are read are Qwen's")
    names = {tensor.name for tensor in header.tensors}
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}


def _gemma(config: Any, header: Header) -> dict[str, Any]:
    """Return Gemma's divisor of attention scores, which llama.cpp knows by the number of blocks, and its windows."""
    wide = header.get("block_count") in (46, 62)  # the 27B models of Gemma 2 and 3
    size = config.hidden_size // config.num_attention_heads if wide else header.get("attention.key_length")
    windows = header.get("attention.sliding_window_pattern")
    if isinstance(windows, list):
        kinds = ["sliding_attention" if each else "full_attention" for each in windows]
        return {"query_pre_attn_scalar": size, "layer_types": kinds}
    return {"query_pre_attn_scalar": size}


def _phi(config: Any, header: Header) -> dict[str, Any]:
    """Return Phi's window, and which part of the channels of a head rotates."""
    part = header.get("rope.dimension_count") / (config.hidden_size // config.num_attention_heads)
    return {
        "sliding_window": header.get("attention.sliding_window"),
        "rope_parameters": config.rope_parameters | {"partial_rotary_factor": part},
    }


def _nothing(config: Any, header: Header) -> dict[str, Any]:
    return {}


# architectures that are read, and what else their config needs
READ: dict[str, Callable[[Any, Header], dict[str, Any]]] = {
    "llama": _llama,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi,
    **dict.fromkeys(
        ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen35", "qwen35moe", "starcoder2", "stablelm", "nemotron"),
        _nothing,
    ),
}
