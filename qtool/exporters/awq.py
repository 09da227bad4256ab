"""``awq``: the ``gemm`` layout of AWQ, which vLLM, SGLang, and transformers with gptqmodel read. Codes have 4 bits.

A linear ``p`` with ``K`` inputs, ``N`` outputs and ``G`` groups has ``p.qweight`` int32 ``[K, N / 8]``, ``p.qzeros``
int32 ``[G, N / 8]`` and ``p.scales`` float16 ``[G, N]``. Packing runs along the outputs: bits ``4 i`` to ``4 i + 3`` of
word ``j`` hold output ``8 j + ORDER[i]``. Zero points are stored as they are, those of symmetric grids too.

The config states one group size for all linears. Larger groups than that are written as several groups with the same
scale, and codes of 2 and 3 bits as codes of 4 bits: neither changes a weight.
"""

from collections.abc import Mapping
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._float16 import layout_floats, unheld
from qtool.exporters._folder import (
    NONE,
    WrittenFolder,
    both_names,
    conv1d,
    float_linears,
    float_tensors,
    float_zeros,
    names_method,
    packed_places,
    packed_tables,
    published_names,
    reader,
    regroup,
    split_rows,
    stored_dtype,
    unfit,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import gathered
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import pack
from qtool.system.errors import InputError

BITS = 4
PER_WORD = 8  # codes of a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each code of a word, lowest bits first
GROUPS = (128, 64, 32, 16)  # group sizes that readers multiply, besides whole rows


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse more than 4 bits, float zero points, packed tables, odd shapes and groups, and scales beyond float16."""
    if refusal := float_zeros(source, "AWQ") or conv1d(source, "and readers of AWQ replace nn.Linear only"):
        return refusal
    for name, key in packed_tables(source).items():
        return (
            f"{name} is quantized, and transformers leaves embeddings and the output head of an AWQ folder in floating "
            f"point; quantize with {key}: float, or export another format, for example compressed-tensors"
        )
    for name, spec in source.specs.items():
        if spec.num_bits > BITS:
            return (
                f"{name} has {spec.num_bits} bits, and AWQ's gemm layout has 4; quantize with at most 4 bits, or "
                "export gptq or compressed-tensors"
            )
    if refusal := split_rows(source, "AWQ") or _shapes_refuse(source) or unheld(source):
        return refusal
    return unfit(source, config)


def _shapes_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why the layout has no place for the rows or groups of a linear, or ``None``."""
    for name, place in packed_places(source).items():
        if place.num_rows % PER_WORD:
            return f"{name} has {place.num_rows} outputs, and AWQ packs {PER_WORD} of them into a word"
    group = _common_group(source)
    if group == -1 or any(group % size == 0 for size in GROUPS):
        return None
    shapes = source.shapes
    sizes = {name: shapes[name][1] // spec.num_groups(shapes[name][1]) for name, spec in source.specs.items()}
    name = next(name for name, size in sizes.items() if size % GROUPS[-1])
    return (
        f"{name} has groups of {sizes[name]} input channels, and readers of AWQ take 16 to 128; {regroup(source, name)}"
    )


def _common_group(source: NativeCheckpoint) -> int:
    """Return the largest group that divides the groups of all linears; -1 if each row of each linear is one group."""
    shapes = source.shapes
    counts = {name: spec.num_groups(shapes[name][1]) for name, spec in source.specs.items()}
    if set(counts.values()) == {1}:
        return -1
    return gcd(*(shapes[name][1] // count for name, count in counts.items()))


def written_group(source: NativeCheckpoint) -> int:
    """Return the ``group_size`` of the config: -1 for whole rows, or the largest of ``GROUPS`` that divides all."""
    group = _common_group(source)
    return group if group == -1 else next(size for size in GROUPS if group % size == 0)


def section(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the ``quantization_config``.

    ``zero_point`` is true of symmetric grids too: vLLM's kernels for AWQ read stored zero points only.
    """
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": written_group(source),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": both_names(float_linears(source, routers=True)),
    }


def packed(quantized: QuantizedWeight, group_size: int) -> dict[str, Tensor]:
    """Return ``qweight``, ``qzeros`` and ``scales`` of a weight in groups of ``group_size`` inputs (-1: whole rows)."""
    codes, scale, zero_point, _ = quantized
    columns = codes.shape[1]
    repeat = 1 if group_size == -1 else columns // group_size // scale.shape[1]
    scale, zero_point = (each.repeat_interleave(repeat, 1) for each in (scale, zero_point))
    return {
        "qweight": _words(codes),
        "qzeros": _words(zero_point.to(torch.uint8)),
        "scales": scale.T.to(torch.float16).contiguous(),
    }


def _words(codes: Tensor) -> Tensor:
    """Return ``codes`` ``[N, n]`` as int32 words ``[n, N / 8]``."""
    outputs = codes.T.unflatten(1, (-1, PER_WORD))[..., list(ORDER)]
    return pack(outputs.flatten(1), BITS)


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    floats, dtype = float_tensors(source, config, stored_dtype(source))
    tensors, read, group = layout_floats(source, floats), reader(source), written_group(source)
    for name, place in packed_places(source).items():
        parts = packed(gathered(place, read), group)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    describe(source, out, dtype, tensors)
    return _notes(source, group)


def _notes(source: NativeCheckpoint, group: int) -> list[str]:
    """Return the notes of a folder with groups of ``group`` inputs."""
    notes, shapes = [], source.shapes
    if any(spec.num_bits < BITS for spec in source.specs.values()):
        notes.append("codes of 2 and 3 bits are written as 4 bits, which changes no weight and saves nothing")
    sizes = {shapes[name][1] // spec.num_groups(shapes[name][1]) for name, spec in source.specs.items()}
    if group != -1 and sizes != {group}:
        notes.append(f"groups of other sizes are written as groups of {group} with the same scale")
    if published_names(source).experts:
        notes.append("transformers itself unpacks no experts of AWQ folders: load this one with vLLM or SGLang")
    return notes


def describe(source: NativeCheckpoint, out: Path, dtype: str, tensors: Mapping[str, Tensor] = NONE) -> None:
    """Write the folder with ``tensors``, by default without weights; see ``Exporter.describe``."""
    write_folder(source.folder, out, tensors, section(source), dtype)


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``."""
    config = opened.config["quantization_config"]
    kind, bits = config.get("version") or config.get("format") or "gemm", config.get("bits")
    if str(kind).lower() != "gemm" or bits != BITS:
        raise InputError(
            f"{opened.folder}: {name} is in AWQ's layout {kind!r} with {bits} bits, which qtool cannot read"
        )
    return unpacked({part: opened.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")})


def unpacked(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the tensors that ``packed`` makes."""
    codes, zeros, scales = _nibbles(parts["qweight"]), _nibbles(parts["qzeros"]), parts["scales"].float()
    size = len(codes) // len(scales)
    steps = codes.unflatten(0, (-1, size)) - zeros.unsqueeze(1)  # [G, size, N]
    weight: Tensor = (steps * scales.unsqueeze(1)).flatten(0, 1)
    return weight.T


def _nibbles(words: Tensor) -> Tensor:
    """Return the codes of ``words`` int32 ``[n, N / 8]`` as float32 ``[n, N]``, with no code of the packer.

    The bytes of a word, lowest first, hold the outputs 0 and 2, 4 and 6, 1 and 3, 5 and 7.
    """
    stream = words.contiguous().numpy().astype("<i4").view(np.uint8).reshape(len(words), -1, 4)
    found = np.empty((*stream.shape[:2], PER_WORD), np.float32)
    for byte, (low, high) in enumerate(((0, 2), (4, 6), (1, 3), (5, 7))):
        found[..., low], found[..., high] = stream[..., byte] % 16, stream[..., byte] // 16
    return torch.from_numpy(found.reshape(len(words), -1))


def _bits(spec: QuantSpec, shape: tuple[int, int], table: bool) -> float:
    """Return the bits per weight of a linear whose own groups are written, or groups of 128 if those are larger."""
    group = shape[1] // spec.num_groups(shape[1])
    written = group if spec.group_size == -1 else next((size for size in GROUPS if group % size == 0), group)
    return BITS + (16 + BITS) / written


EXPORTER = Exporter(
    "AWQ's gemm layout: 4 bits, with zero points or without",
    refuses,
    write,
    describe,
    read,
    "Load it with vLLM or SGLang, or with `transformers` and `gptqmodel` installed.",
    partial(WrittenFolder, marker="scales"),
    recognises=partial(names_method, "awq"),
    bits=_bits,
    reader=Runner("awq", ("gptqmodel",)),
)
