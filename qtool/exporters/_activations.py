"""Rounding of inputs in exports: the grid that engines compute, and why others are refused.

Engines multiply integers on one grid: 8 bits, symmetric, with a range for each token that is made at run time
(``quant/activations.py``). compressed-tensors names it in a config group; no other format that qtool writes has a word
for it.
"""

from typing import Any

from torch import nn

from qtool.config.quant import ActivationGrid, QuantSpec
from qtool.quant.activations import round_input

INT8 = ActivationGrid(num_bits=8, symmetric=True)
ARGUMENTS: dict[str, Any] = {  # INT8 as the input_activations of a config group of compressed-tensors
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "group_size": None,
    "dynamic": True,
    "actorder": None,
}
MEANING = ("num_bits", "type", "symmetric", "strategy", "dynamic")  # keys that decide what a reader computes
SYMMETRIC = "quant.activations: {num_bits: 8, symmetric: true}"


def unheld(linear: str, spec: QuantSpec, format: str, *, holds_int8: bool) -> str | None:
    """Return the reason why ``format`` cannot say how ``linear`` rounds its input and output, or ``None``."""
    if spec.kv_cache is not None:
        return (
            f"{linear} rounds keys or values (quant.kv_cache), which {format} cannot express: engines choose integers "
            "for the KV cache when they start (llama.cpp, transformers) or read FP8 only (vLLM); use the native "
            "checkpoint, or quantize without kv_cache"
        )
    if spec.activations is None or (holds_int8 and spec.activations == INT8):
        return None
    if not holds_int8:
        return (
            f"{linear} rounds activations (quant.activations), which {format} cannot express, so that its readers "
            "would not do it; use the native checkpoint or, for symmetric 8-bit ones, compressed-tensors, or quantize "
            "without this key"
        )
    if not spec.activations.symmetric:
        return (
            f"{linear} rounds activations asymmetrically, from the minimum of each token, and no engine computes that: "
            f"int8 kernels are symmetric; use the native checkpoint, or quantize with {SYMMETRIC}"
        )
    return (
        f"{linear} rounds activations to {spec.activations.num_bits} bits, and exports hold 8 bits only, those of int8 "
        f"kernels; use the native checkpoint, or quantize with {SYMMETRIC}"
    )


def grid_of(arguments: Any) -> ActivationGrid | None:
    """Return the grid that ``input_activations`` of a config group means; ``None``: inputs are not rounded.

    Raises:
        ValueError: it is another grid; the message says what was found.
    """
    if arguments is None:
        return None
    found = {key: arguments.get(key) for key in MEANING} if isinstance(arguments, dict) else arguments
    if found != {key: ARGUMENTS[key] for key in MEANING}:
        raise ValueError(f"it rounds activations by {found}")
    return INT8


def round_inputs(linear: nn.Module, grid: ActivationGrid) -> None:
    """Let ``linear`` round its input to ``grid`` in every call."""
    spec = QuantSpec(activations=grid)
    linear.register_forward_pre_hook(lambda _, args: (round_input(args[0], spec), *args[1:]))
