"""``gptq``: the layout that GPTQModel, transformers (with gptqmodel or auto-round), vLLM and SGLang read.

A linear ``p`` with ``K`` inputs, ``N`` outputs, ``G`` groups and ``b`` bits has ``p.qweight`` int32 ``[K b / 32, N]``
(each column is a bit stream along ``K``), ``p.qzeros`` int32 ``[G, N b / 32]``, ``p.scales`` float16 ``[G, N]`` and
``p.g_idx`` int32 ``[K]``, the group of each input.

Version 1 stores ``zero_point - 1``, and readers add one to a whole word: a zero point of 0 would carry into its
neighbour. So symmetric checkpoints are written as version 1, which most software reads, and asymmetric ones as
version 2, which stores the zero point as it is. ``gptq-v2`` writes version 2 for both.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import BITS, QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._float16 import layout_floats, unheld
from qtool.exporters._folder import (
    NONE,
    WrittenFolder,
    block_prefixes,
    both_names,
    conv1d,
    float_in_blocks,
    float_tensors,
    float_zeros,
    names_method,
    packed_places,
    published_names,
    reader,
    split_rows,
    stored_dtype,
    unfit,
    unpack_bits,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import gathered
from qtool.exporters._tables import in_blocks, names_of, outside_blocks, refused_embedding
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import WORD, pack
from qtool.system.errors import InputError
from qtool.system.version import __version__

ALIGNMENT = 32  # inputs and outputs of a linear must be a multiple of this
LOADING = (
    "Load it with `transformers` and `gptqmodel` (or `auto-round`) installed; vLLM and SGLang read 4 and 8 bits when "
    "symmetric."
)
READER = Runner("gptqmodel", ("gptqmodel",))
LAYOUT = ("qweight", "qzeros", "scales")  # tensors that packed() makes of a linear


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse float zero points, mixed grids, linears left in float in some blocks, odd shapes, and inexact scales."""
    reader = "GPTQModel 7.7 reads embeddings with scales of groups of tokens, where this one has scales of each token"
    if refusal := float_zeros(source, "GPTQ") or refused_embedding(source, reader):
        return refusal
    specs = {tuple(grid(spec).values()) for spec in in_blocks(source).values()}
    if len(specs) > 1:
        return (
            f"its linears have {len(specs)} different grids, and a GPTQ config for transformers states only one; "
            "export auto-round or compressed-tensors instead"
        )
    kept, left = kinds(source)
    for name, kind in left.items():
        if any(each in kind for each in kept):
            return (
                f"{name} is left in floating point, and a linear of that name in another block is not, which a GPTQ "
                "config cannot express; export auto-round or compressed-tensors instead"
            )
    return layout_refuses(source, "GPTQ") or unfit(source, config)


def grid(spec: QuantSpec) -> dict[str, Any]:
    """Return ``spec`` in the keys of GPTQ."""
    return {"bits": spec.num_bits, "group_size": spec.group_size, "sym": spec.symmetric}


def layout_refuses(source: NativeCheckpoint, format: str) -> str | None:
    """Return the reason why ``format``, GPTQ or auto-round, cannot hold ``source``, if its tensors do not fit."""
    if refusal := conv1d(source, f"whose weight is transposed, and readers of {format} do not agree on its layout"):
        return refusal
    if refusal := split_rows(source, format):
        return refusal
    shapes = source.shapes
    for name, place in packed_places(source).items():
        rows, columns = place.num_rows, shapes[next(iter(place.linears))][1]
        if rows % ALIGNMENT or columns % ALIGNMENT:
            return f"{name} is {rows} x {columns}, and {format} readers need multiples of {ALIGNMENT}"
    return unheld(source)


def kinds(source: NativeCheckpoint) -> tuple[list[str], dict[str, str]]:
    """Return the names within a block of the quantized linears, and of those left in float, by full name."""
    own, published = block_prefixes(source)
    names = published_names(source)

    def kind(name: str) -> str:
        return name.removeprefix(own).removeprefix(published).partition(".")[2]

    linears = in_blocks(source)
    kept = both_names({linear: [] if linear in names.experts else names.modules(linear) for linear in linears})
    return list(dict.fromkeys(map(kind, kept))), {name: kind(name) for name in float_in_blocks(source)}


def section(source: NativeCheckpoint, version: int) -> dict[str, Any]:
    """Return the ``quantization_config``, which is also written as ``quantize_config.json``.

    Linears of the blocks that are left in floating point are named twice: GPTQModel and SGLang read ``dynamic``,
    transformers (optimum) ``modules_in_block_to_quantize``, and vLLM both. A packed head is named twice too: optimum
    looks for it only if its search is not limited to the blocks.
    """
    spec, name = next(iter(in_blocks(source).values())), "gptq" if version == 1 else "gptq_v2"
    kept, left = kinds(source)
    outside = outside_blocks(source)
    dynamic: dict[str, Any] = {rf"-:.*\.{re.escape(kind)}$": {} for kind in left.values()}
    for linear, own in outside.items():
        if grid(own) != grid(spec):
            dynamic |= {f"+:^{re.escape(each)}$": grid(own) for each in names_of(source, linear)}
    named: dict[str, Any] = {"dynamic": dynamic} if dynamic else {}
    if left or outside:
        named["modules_in_block_to_quantize"] = [[*kept, *names_of(source, *outside)]]
    if outside:
        named["block_name_to_quantize"] = ""
    return {
        "quant_method": "gptq",
        **grid(spec),
        "desc_act": False,
        "lm_head": bool(outside),
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
        "meta": {"quantizer": [f"qtool:{__version__}"]},
    } | named


def packed(quantized: QuantizedWeight, version: int) -> dict[str, Tensor]:
    """Return ``qweight``, ``qzeros`` and ``scales`` of a weight in ``version`` 1 or 2."""
    codes, scale, zero_point, spec = quantized
    zeros = zero_point.to(torch.int32) - (1 if version == 1 else 0)
    assert int(zeros.min()) >= 0, "version 1 cannot hold a zero point of 0"
    return {
        "qweight": pack(codes, spec.num_bits).T.contiguous(),
        "qzeros": pack(zeros.T.contiguous(), spec.num_bits),
        "scales": scale.T.to(torch.float16).contiguous(),
    }


def write_version(source: NativeCheckpoint, out: Path, config: ExportConfig, version: int) -> list[str]:
    """Write the folder in ``version`` 1 or 2; see ``Exporter.write``."""
    floats, dtype = float_tensors(source, config, stored_dtype(source))
    tensors, read = layout_floats(source, floats), reader(source)
    for name, place in packed_places(source).items():
        quantized = gathered(place, read)
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed(quantized, version).items()}
        spec, columns = quantized.spec, quantized.codes.shape[1]
        tensors[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) // (columns // spec.num_groups(columns))
    describe_version(source, out, dtype, version, tensors)
    notes, first = [f"written as {section(source, version)['format']}"], next(iter(in_blocks(source).values()))
    if left := kinds(source)[1]:
        notes.append(f"{len(left)} linear(s) of the blocks are left in floating point (dynamic in config.json)")
    specs = source.specs.values()
    if any(spec.num_bits in (2, 3) for spec in specs):
        notes.append("vLLM and SGLang have no 2- or 3-bit GPTQ kernels; for them, export compressed-tensors")
    elif not all(spec.symmetric for spec in specs):
        notes.append("vLLM and SGLang refuse asymmetric GPTQ; for them, export compressed-tensors")
    sizes = (first.num_bits, first.group_size)
    outside = outside_blocks(source).items()
    if others := [linear for linear, spec in outside if (spec.num_bits, spec.group_size) != sizes]:
        notes.append(
            f"{', '.join(others)} has other bits or groups than the linears (dynamic in config.json), which GPTQModel "
            "reads; transformers stops, because it reads one grid: for it, give the head their bits and groups, or "
            "quant.head: float"
        )
    if published_names(source).experts:
        notes.append(
            "transformers itself unpacks no experts of GPTQ folders: load this one with GPTQModel, vLLM or SGLang"
        )
    return notes


def describe_version(
    source: NativeCheckpoint, out: Path, dtype: str, version: int, tensors: Mapping[str, Tensor] = NONE
) -> None:
    """Write the folder in ``version`` 1 or 2 with ``tensors``, by default without weights."""
    described = section(source, version)
    write_folder(source.folder, out, tensors, described, dtype)
    write_json(out / "quantize_config.json", described)


def bits(spec: QuantSpec, shape: tuple[int, int], table: bool) -> float:
    """Return the bits per weight of a linear: codes, scales and zero points, and the group of each channel."""
    rows, columns = shape
    return packed_bits(spec, columns) + 32 / rows


def packed_bits(spec: QuantSpec, columns: int) -> float:
    """Return the bits per weight of codes, float16 scales and zero points, which symmetric grids have too."""
    return spec.num_bits + (16 + spec.num_bits) * spec.num_groups(columns) / columns


def version_of(source: NativeCheckpoint) -> int:
    """Return the version in which ``gptq`` writes a checkpoint: 1 if its grids are symmetric, else 2."""
    return 1 if all(spec.symmetric for spec in source.specs.values()) else 2


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write version 1 if the grid is symmetric, else version 2; see ``Exporter.write``."""
    return write_version(source, out, config, version_of(source))


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``, unpacked bit by bit."""
    config = opened.config["quantization_config"]
    kind, bits = config.get("checkpoint_format", "gptq"), _bits(config, name)
    if kind not in ("gptq", "gptq_v2") or bits not in BITS:
        raise InputError(
            f"{opened.folder}: {name} is in GPTQ's format {kind!r} with {bits} bits, which qtool cannot read"
        )
    parts = {part: opened.tensor(f"{name}.{part}") for part in (*LAYOUT, "g_idx")}
    return unpacked(parts, bits, 1 if kind == "gptq" else 0, parts["g_idx"].long())


def _bits(config: dict[str, Any], name: str) -> Any:
    """Return the bits of a linear: those of the first pattern of ``dynamic`` that matches it, or of all linears."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return changes.get("bits", config.get("bits"))
    return config.get("bits")


def unpacked(parts: dict[str, Tensor], bits: int, offset: int, groups: Tensor | None = None) -> Tensor:
    """Unpack the weight float32 ``[out, in]`` from the tensors that ``packed`` makes, bit by bit.

    ``offset`` is added to stored zero points. ``groups`` ``[in]`` is the group of each channel; ``None``: in order.
    """
    scales = parts["scales"].float()  # [G, N]
    columns = parts["qweight"].shape[0] * WORD // bits
    if groups is None:
        groups = torch.arange(columns) // (columns // len(scales))
    codes = unpack_bits(parts["qweight"].T.contiguous(), bits, columns).T  # [K, N]
    zeros = unpack_bits(parts["qzeros"], bits, scales.shape[1]) + offset  # [G, N]
    return ((codes - zeros[groups]) * scales[groups]).T


EXPORTER = Exporter(
    "GPTQ: version 1 when symmetric, version 2 when not",
    refuses,
    write,
    lambda source, out, dtype: describe_version(source, out, dtype, version_of(source)),
    read,
    LOADING,
    partial(WrittenFolder, marker="scales"),
    recognises=partial(names_method, "gptq"),
    bits=bits,
    reader=READER,
)
