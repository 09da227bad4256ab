"""How llama.cpp lays out the tensors of a model: the order of rows, what is added to norms, what is float32."""

from typing import Any

import torch
from torch import Tensor

from qtool.exporters.gguf import figures
from qtool.exporters.gguf.families import FAMILIES

ROUTER = "ffn_gate_inp"  # part of the names of tensors that choose experts
FLOAT32 = ("norm", "position_embd", "ssm_conv1d", ROUTER)  # parts of the names of tensors that are read in float32


def held(there: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a float tensor as a file holds it under the name ``there``, with its rows in the model's order."""
    if there.endswith("ssm_a"):
        return -tensor.float().exp()
    if tensor.dim() > 1 and not any(part in there for part in FLOAT32):
        return tensor
    added = tensor.float() + _offset(there, config)
    if "ssm_conv1d" in there:
        return added.squeeze(1)
    return added.squeeze(0) if ROUTER in there else added  # the gate of a shared expert has one row


def given_back(there: str, values: Tensor, config: Any) -> Tensor:
    """Return the float tensor that ``held`` has made ``values`` of."""
    if there.endswith("ssm_a"):
        return (-values).log()
    if "ssm_conv1d" in there:
        return values.unsqueeze(1)
    return (
        (values - _offset(there, config)).unsqueeze(0)
        if f"{ROUTER}_shexp" in there
        else values - _offset(there, config)
    )


def _offset(there: str, config: Any) -> int:
    added = FAMILIES[config.model_type].norm_offset if there.endswith("norm.weight") else 0
    return 0 if "ssm_norm" in there else added


def row_order(there: str, rows: int, config: Any) -> Tensor | None:
    """Return the order in which ``rows`` rows of a tensor of a model are written; ``None``: as they are.

    Weights, biases, codes, scales and zero points have the same order.
    """
    if not FAMILIES[config.model_type].rows:
        return None
    part = there.split(".")[2] if there.startswith("blk.") else ""
    kind, heads, kv_heads = FAMILIES[config.model_type].rows, config.num_attention_heads, figures.num_kv_heads(config)
    count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
    if kind == "pairs" and count is not None:
        return torch.flatten(torch.arange(rows).unflatten(0, (count, 2, -1)).transpose(1, 2))
    if kind == "groups" and part == "attn_qkv":
        groups = torch.arange(rows).unflatten(0, (kv_heads, heads // kv_heads + 2, -1))
        return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])
    if kind == "tiles" and part in ("attn_qkv", "ssm_conv1d"):
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return torch.cat([torch.arange(keys), keys + _tiles(rows - keys, config)])
    if kind == "tiles" and part in ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
        return _tiles(rows, config)
    return None


def column_order(there: str, columns: int, config: Any) -> Tensor | None:
    """Return the order in which ``columns`` columns of a tensor of a model are written; ``None``: as they are."""
    tiled = FAMILIES[config.model_type].rows == "tiles" and ".ssm_out." in there
    order = _tiles(columns, config) if tiled else None
    return None if order is None or torch.equal(order, torch.arange(columns)) else order


def _tiles(count: int, config: Any) -> Tensor:
    """Return the order of ``count`` channels of value heads: a head of each key head, then the next of each."""
    size = count // config.linear_num_value_heads
    heads = torch.arange(count).unflatten(0, (config.linear_num_key_heads, -1, size))
    return torch.flatten(heads.transpose(0, 1))
