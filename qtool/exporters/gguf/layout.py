"""How llama.cpp lays out the tensors of a model: the order of rows, what is added to norms, what is float32."""

from typing import Any

import torch
from torch import Tensor

from qtool.exporters.gguf import figures
from qtool.exporters.gguf.families import FAMILIES

ROUTER = "ffn_gate_inp"  # part of the names of tensors that choose experts
FLOAT32 = ("norm", "position_embd", ROUTER)  # parts of the names of tensors that llama.cpp reads in float32


def is_small(there: str, tensor: Tensor) -> bool:
    """Return whether the tensor that a file names ``there`` is written in float32."""
    return tensor.dim() == 1 or any(part in there for part in FLOAT32)


def offset(there: str, config: Any) -> int:
    """Return what is added to the tensor that a file names ``there``."""
    return FAMILIES[config.model_type].norm_offset if there.endswith("norm.weight") else 0


def row_order(there: str, rows: int, config: Any) -> Tensor | None:
    """Return the order in which ``rows`` rows of a tensor of a model are written; ``None``: as they are.

    Only the order of the rows of a tensor differs, so it is the same for weights, biases, codes, scales and zero points.
    """
    part = there.rpartition(".")[0].rpartition(".")[2]
    kind, heads, kv_heads = FAMILIES[config.model_type].rows, config.num_attention_heads, figures.num_kv_heads(config)
    count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
    if kind == "pairs" and count is not None:
        return torch.arange(rows).unflatten(0, (count, 2, -1)).transpose(1, 2).flatten()
    if kind == "groups" and part == "attn_qkv":
        groups = torch.arange(rows).unflatten(0, (kv_heads, heads // kv_heads + 2, -1))
        return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])
    return None
