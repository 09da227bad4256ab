"""compressed-tensors unpacks the weights of its folders, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors import safe_open
from torch import Tensor, nn


def weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the weight float32 ``[out, in]`` of every packed linear or embedding by its name."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for key in sorted(names):
                name, _, part = key.rpartition(".")
                if part != "weight_scale" or not names & {f"{name}.weight", f"{name}.weight_packed"}:
                    continue  # not of a packed weight, or a copy beside a head that computes with the embedding
                found = {
                    each: tensors.get_tensor(f"{name}.{each}")
                    for each in ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
                    if f"{name}.{each}" in names
                }
                yield name, _unpacked(config, name, found).numpy()


def _unpacked(config: Any, name: str, parts: dict[str, Tensor]) -> Tensor:
    """Return a weight float32 ``[out, in]``: whole numbers less their zero points, times the scales of their groups."""
    scale, zero = parts["weight_scale"].float(), parts.get("weight_zero_point")
    if "weight" in parts:
        codes = parts["weight"]
    else:
        layer = nn.Linear(1, 1, device="meta")
        bits = next(g.weights.num_bits for g in config.config_groups.values() if is_match(name, layer, g.targets))
        codes = unpack_from_int32(parts["weight_packed"], bits, torch.Size(parts["weight_shape"].tolist()))
        if zero is not None:
            zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0)
    repeat = codes.shape[1] // scale.shape[1]
    shifted = codes.float() if zero is None else codes.float() - zero.float().repeat_interleave(repeat, 1)
    return shifted * scale.repeat_interleave(repeat, 1)
