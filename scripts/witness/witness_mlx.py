"""Weights and logits of an MLX folder as mlx-lm computes them.

Run by an interpreter that has mlx and mlx-lm (`pip install "mlx[cpu]" mlx-lm` where there is no Apple GPU):

    <python of that environment> witness_mlx.py FOLDER WITNESS.safetensors

The written file holds `tokens` int64 [b, t], `logits` float32 [b, t, vocabulary], and the weight `<module>.weight`
[out, in] of every packed linear or embedding, or [experts, out, in] of a stack of experts, in the dtype that MLX
dequantizes it to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model

PACKED = (nn.QuantizedEmbedding, nn.QuantizedLinear, QuantizedSwitchLinear)


def dense_weight(layer: nn.Module) -> mx.array:
    """Return the weight ``[out, in]``, or ``[experts, out, in]``, of a packed layer, dequantized by MLX."""
    grid = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.biases, **grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an MLX folder")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    args = parser.parse_args()
    model, config = load_model(args.folder)
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PACKED)}
    witness = {f"{name}.weight": dense_weight(layer) for name, layer in packed.items()}
    model.set_dtype(mx.float32)
    tokens = mx.array(np.random.default_rng(0).integers(config["vocab_size"], size=(2, 64)))
    mx.save_safetensors(str(args.output), witness | {"tokens": tokens, "logits": model(tokens)})
    print(args.output)


if __name__ == "__main__":
    main()
