"""Tiny models as they are published in FP8 and MXFP4, and their weights from the formulas, number by number.

Nothing here uses the code of ``qtool``.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import tiny

E4M3 = torch.float8_e4m3fn
Scaled = tuple[Tensor, Tensor]


def value_e4m3(byte: int) -> float:
    """Return the value of an E4M3 byte: sign, 4 bits of exponent (bias 7), 3 bits of mantissa."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def value_e2m1(code: int) -> float:
    """Return the value of an E2M1 code: sign, 2 bits of exponent (bias 1), 1 bit of mantissa."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def slow_fp8(codes: Tensor, scale_of: Callable[[int, int], float]) -> Tensor:
    """Return the weight of E4M3 ``codes`` in bfloat16; ``scale_of`` gives the scale of a row and a column."""
    rows = codes.view(torch.uint8).tolist()
    values = [[value_e4m3(byte) * scale_of(i, j) for j, byte in enumerate(row)] for i, row in enumerate(rows)]
    return torch.tensor(values, dtype=torch.float64).float().bfloat16()


def slow_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weight ``[experts, columns, rows]`` bfloat16 of MXFP4 blocks ``[experts, rows, groups, 16]``."""
    experts = [
        [
            [value_e2m1(code) * 2.0 ** (e - 127) for b, e in zip(row, exponents, strict=True) for code in halves(b)]
            for row, exponents in zip(expert, each, strict=True)
        ]
        for expert, each in zip(blocks.tolist(), scales.tolist(), strict=True)
    ]
    return torch.tensor(experts, dtype=torch.float64).bfloat16().transpose(1, 2).contiguous()


def halves(group: list[int]) -> list[int]:
    """Return the codes in bytes, the lower half of each first."""
    return [code for byte in group for code in (byte & 15, byte >> 4)]


def in_blocks(weight: Tensor, block: tuple[int, int]) -> Scaled:
    """Return E4M3 codes and float32 scales of blocks of a weight; the last blocks may be cut off."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(rows, columns, dtype=E4M3)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scale[i, j]).to(E4M3)
    return codes, scale


def in_rows(weight: Tensor) -> Scaled:
    """Return E4M3 codes and one bfloat16 scale for each row, as llm-compressor writes them."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return (weight.float() / scale.float()).clamp(-448, 448).to(E4M3), scale


def as_tensor(weight: Tensor) -> Scaled:
    """Return E4M3 codes and one scale of the whole weight."""
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).to(E4M3), scale


def write(
    folder: Path,
    out: Path,
    section: dict[str, object],
    quantize: Callable[[Tensor], Scaled],
    suffix: str,
    *,
    shards: int = 1,
    more: dict[str, Tensor] | None = None,
) -> Path:
    """Write the tiny model of ``folder`` with the linears of its blocks in FP8; ``suffix`` ends a scale's name."""
    tiny.copied(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    tensors = dict(more or {})
    for name, tensor in load_file(out / "model.safetensors").items():
        if "layers" in name and tensor.dim() == 2:
            codes, scale = quantize(tensor)
            tensors |= {name: codes, name.removesuffix("weight") + suffix: scale}
        else:
            tensors[name] = tensor
    (out / "model.safetensors").unlink()
    write_shards(tensors, out, shards)
    return out


def write_shards(tensors: dict[str, Tensor], out: Path, count: int) -> None:
    """Write tensors to ``count`` files with an index; a weight and its scale need not be in the same one."""
    names = sorted(tensors)
    files = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for index, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[index::count]}, out / file, {"format": "pt"})
    if count > 1:
        weight_map = {name: files[i % count] for i, name in enumerate(names)}
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


DEEPSEEK: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [40, 48],  # no divisor of 64 and 96: the last blocks are cut off
}
COMPRESSED: dict[str, object] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
