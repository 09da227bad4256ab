"""MLX: ``mx.dequantize`` unpacks weights, and mlx-lm computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield each packed weight ``[out, in]``, or stack ``[experts, out, in]``, in the dtype that MLX gives it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    grids = config.get("quantization") or config["quantization_config"]
    for file in sorted(folder.glob("*.safetensors")):
        tensors: Any = mx.load(str(file))
        for name in sorted(key.removesuffix(".scales") for key in tensors if key.endswith(".scales")):
            grid = {**grids, **(grids.get(name) or {})}
            options = {"group_size": grid["group_size"], "bits": grid["bits"], "mode": grid.get("mode", "affine")}
            parts = [tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
            yield name, np.array(mx.dequantize(*parts, **options))


def load(folder: Path) -> Any:
    """Return the model as mlx-lm loads it, in float32."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def logits(model: Any, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logits ``[t, vocabulary]`` of ``tokens`` ``[t]``."""
    found: npt.NDArray[Any] = np.array(model(mx.array(tokens[None])).astype(mx.float32))[0]
    return found
