"""``mlx``: the affine layout of MLX, for Apple machines (and any other that has MLX), read by mlx-lm.

A linear ``p`` with ``K`` inputs, ``N`` outputs, ``G`` groups and ``b`` bits has ``p.weight`` uint32 ``[N, K b / 32]``
(the bit stream of ``quant/packing.py``), and float32 ``p.scales`` and ``p.biases`` ``[N, G]``, with
``w = code * scale + bias`` and so ``bias = -scale * zero_point``.

MLX dequantizes in the dtype of its scales. A float16 scale has 11 significant bits and a code or zero point up to 8,
so products are exact in float32 and rounded in 16 bits, where biases alone would change weights by up to 6e-4 of their
size. So scales and biases are written in float32, and only scales whose products float32 does not hold are refused.

Embeddings and heads are packed in the same way; a head that computes with the embedding's table is not written.

MLX multiplies groups of 32, 64 and 128 channels. A larger group, or a whole row, that one of these divides is written
as several groups with the same scale, which changes no weight.
"""

from collections import Counter
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
from qtool.exporters._folder import (
    NONE,
    WrittenFolder,
    conv1d,
    float_linears,
    float_tensors,
    float_zeros,
    grids,
    packed_places,
    packed_tables,
    published_names,
    quantization_section,
    reader,
    regroup,
    stored_dtype,
    unfit,
    unpack_bits,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import Place, Published, gathered
from qtool.models.folders import read_config
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import WORD, pack
from qtool.system.errors import InputError

GROUPS = (128, 64, 32)  # group sizes that MLX multiplies

# mixtures of experts that mlx-lm computes as transformers does, by model_type: the module of the stacks in mlx-lm
SWITCH = {
    "deepseek_v3": "switch_mlp",
    "dots1": "experts",
    "exaone_moe": "switch_mlp",
    "glm4_moe": "switch_mlp",
    "granitemoe": "switch_mlp",
    "lfm2_moe": "switch_mlp",
    "mixtral": "switch_mlp",
    "nemotron_h": "switch_mlp",
    "olmoe": "switch_mlp",
    "qwen2_moe": "switch_mlp",
    "qwen3_moe": "switch_mlp",
}
# names of mlx-lm for parts of published names, by model_type
RENAMED = {
    "nemotron_h": {".switch_mlp.up_proj.": ".switch_mlp.fc1.", ".switch_mlp.down_proj.": ".switch_mlp.fc2."},
    "lfm2_moe": {
        ".feed_forward.w1.": ".feed_forward.gate_proj.",
        ".feed_forward.w2.": ".feed_forward.down_proj.",
        ".feed_forward.w3.": ".feed_forward.up_proj.",
    },
}
# models of which mlx-lm multiplies by the embedding's weight itself, which are codes if it is packed, to get logits
BY_WEIGHT = ("llama4_text", "seed_oss")
# models whose kv_b_proj mlx-lm cuts in two when it loads them, and rounds both halves if it is quantized
LATENT = ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash")


def places(names: Published) -> dict[str, Place]:
    """Return where MLX holds linears: the experts of a layer in stacks, as mlx-lm makes them of float experts."""
    model: Any = names.model
    kind = model.config.model_type
    found = names.stacks(lambda parent, leaf: f"{parent}.{SWITCH.get(kind, 'switch_mlp')}.{leaf}.weight")
    return {_renamed(name, kind): place for name, place in found.items()}


def _renamed(name: str, kind: str) -> str:
    """Return the name of mlx-lm for a tensor of a model of the type ``kind``, by its published name."""
    for part, there in RENAMED.get(kind, {}).items():
        name = name.replace(part, there)
    return name


def _experts_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why mlx-lm does not read the experts of a model, or packs a linear anew, or ``None``."""
    names = published_names(source)
    model: Any = names.model.config
    if names.experts and model.model_type not in SWITCH:
        return (
            f"its experts are those of {model.model_type}, and qtool writes MLX stacks of experts for "
            f"{', '.join(SWITCH)}; export dense, and convert the result with mlx_lm.convert"
        )
    again = next((name for name in source.specs if name.endswith(".kv_b_proj")), None)
    if again is not None and model.model_type in LATENT:
        return (
            f"{again} is quantized, and mlx-lm cuts it in two and rounds both again when it loads a {model.model_type} "
            "model; leave it in floating point (quant.overrides: '*.kv_b_proj': {skip: true})"
        )
    return None


def _tables_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why mlx-lm does not compute with a packed embedding, or ``None``."""
    model: Any = published_names(source).model
    for head, table in source.tables.tied.items():
        if model.config.model_type in BY_WEIGHT:
            return (
                f"{head} computes with the packed table {table} (tied weights), and mlx-lm multiplies by its codes as "
                f"they are in a {model.config.model_type} model; leave it in floating point (quant.embedding: float), "
                "or export dense"
            )
    return None


def written_group(spec: QuantSpec, columns: int) -> int | None:
    """Return the largest group of MLX that divides a group of ``spec`` in rows of ``columns``, or ``None``."""
    group = columns // spec.num_groups(columns)
    return next((size for size in GROUPS if group % size == 0), None)


def exact(scale: Tensor, spec: QuantSpec) -> bool:
    """Return whether float32 holds each scale times each code.

    It is enough to test the highest code ``2**num_bits - 1``: a product of two odd numbers is odd and grows with both,
    so no other product has more significant bits. Subnormal scales do not count as exact: engines take them for zero.
    """
    product = scale.float() * spec.qmax
    normal = scale.float().abs() >= torch.finfo(torch.float32).smallest_normal
    return bool(((product.double() == scale.double() * spec.qmax) & normal).all())


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse float zero points, ``Conv1D`` layers, group sizes that MLX lacks, and scales of too many bits."""
    if refusal := float_zeros(source, "MLX") or conv1d(source, "and MLX packs nn.Linear only"):
        return refusal
    if refusal := _experts_refuse(source) or _tables_refuse(source):
        return refusal
    for name, spec in source.specs.items():
        columns = int(source.tensor(f"{name}.weight_shape")[1])
        if written_group(spec, columns) is None:
            return (
                f"{name} has groups of {columns // spec.num_groups(columns)} input channels, and MLX multiplies groups "
                f"of 32, 64 and 128; {regroup(source, name)}"
            )
        if not exact(source.tensor(f"{name}.weight_scale"), spec):
            return (
                f"{name}.weight_scale times a code is not exact in float32, in which MLX computes it; "
                "quantize with scale_dtype: float16"
            )
    return unfit(source, config)


def settings(spec: QuantSpec, columns: int) -> dict[str, Any]:
    """Return ``spec`` for rows of ``columns`` in the keys of MLX."""
    return {"group_size": written_group(spec, columns), "bits": spec.num_bits}


def section(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the config's ``quantization``: the most common grid, what differs, ``False`` for float linears.

    A float embedding needs no entry: mlx-lm packs nothing that has no scales in the files.
    """
    found, shapes = grids(source, _packed(source)), source.shapes
    own = {name: next(iter(place.linears)) for name, place in _packed(source).items()}
    held = {name: settings(spec, shapes[own[name]][1]) for name, spec in found.items()}
    common = Counter(tuple(grid.items()) for grid in held.values()).most_common(1)[0][0]
    differ = {name: grid for name, grid in held.items() if tuple(grid.items()) != common}
    floats = [name for published in float_linears(source).values() for name in published]
    return {**dict(common), "mode": "affine", **differ, **dict.fromkeys(floats, False)}


def _packed(source: NativeCheckpoint) -> dict[str, Place]:
    return packed_places(source, places(published_names(source)))


def packed(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``weight``, ``scales`` and ``biases`` of a weight."""
    codes, scale, zero_point, spec = quantized
    group = written_group(spec, codes.shape[1])
    assert group is not None
    repeat = codes.shape[1] // group // scale.shape[1]
    return {
        "weight": pack(codes, spec.num_bits).view(torch.uint32),
        "scales": scale.float().repeat_interleave(repeat, 1),
        "biases": (-scale.float() * zero_point).repeat_interleave(repeat, 1),
    }


def describe(source: NativeCheckpoint, out: Path, dtype: str, tensors: Mapping[str, Tensor] = NONE) -> None:
    """Write the folder with ``tensors``, by default none. The config states the grids twice, as mlx-lm does."""
    described = section(source)
    write_folder(source.folder, out, tensors, described, dtype)
    write_json(out / "config.json", read_config(out) | {"quantization": described})


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    floats, dtype = float_tensors(source, config, stored_dtype(source))
    names = published_names(source)
    tensors, weight = names.floats(floats, places(names)), reader(source)
    sizes, bits, split = Counter[str](), Counter[str](), set()
    tables = packed_tables(source)
    for name, place in _packed(source).items():
        quantized = gathered(place, weight)
        parts = packed(quantized)
        tensors |= {f"{name}.{part}": rows.unflatten(0, place.shape) for part, rows in parts.items()}
        linear = next(iter(place.linears))
        part = linear if linear in tables else ""  # linears are counted together
        sizes[part] += quantized.codes.numel()
        bits[part] += 8 * sum(tensor.nbytes for tensor in parts.values())
        if parts["scales"].shape != quantized.scale.shape:
            split.add(quantized.spec.label())
    describe(source, out, dtype, tensors)
    each = {part: f"{bits[part] / sizes[part]:.2f} bits per weight as written" for part in sizes}
    why = "scales and biases are float32, because 16 bits would change weights; MLX computes with them in float32"
    notes = [f"{part}: {said}" if part else f"{said}: {why}" for part, said in each.items()]
    if split:
        notes.append(f"groups of {', '.join(sorted(split))} are written as smaller ones with the same scale")
    return notes


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear ``name``, unpacked bit by bit; of a stack its rows."""
    # mlx-lm reads "quantization" first
    config = opened.config.get("quantization") or opened.config["quantization_config"]
    grid = {**config, **(config.get(name) or {})}
    mode, bits = grid.get("mode", "affine"), grid.get("bits")
    if mode != "affine" or bits not in BITS:
        raise InputError(f"{opened.folder}: {name} is in MLX's mode {mode!r} with {bits} bits, which qtool cannot read")
    parts = {part: opened.tensor(f"{name}.{part}") for part in ("weight", "scales", "biases")}
    return unpacked({part: tensor.flatten(0, -2) for part, tensor in parts.items()}, bits)


def unpacked(parts: dict[str, Tensor], bits: int) -> Tensor:
    """Unpack the weight float32 ``[out, in]`` from the tensors that ``packed`` makes, bit by bit."""
    words, scales, biases = parts["weight"].view(torch.int32), parts["scales"].float(), parts["biases"].float()
    columns = words.shape[1] * WORD // bits
    weight = unpack_bits(words, bits, columns)
    weight.view(*scales.shape, -1).mul_(scales.unsqueeze(-1)).add_(biases.unsqueeze(-1))
    return weight


def recognises(folder: Path) -> bool:
    """Return whether the config of a folder has the keys of MLX's own models."""
    section = quantization_section(folder) or read_config(folder).get("quantization") or {}
    return section.get("quant_method") is None and {"group_size", "bits"} <= section.keys()


EXPORTER = Exporter(
    "MLX affine, for Apple machines",
    refuses,
    write,
    describe,
    read,
    "Load it with `mlx-lm`, on an Apple machine or any other that has MLX.",
    partial(WrittenFolder, marker="scales"),
    places,
    recognises,
    library="mlx",
    bits=lambda spec, shape, table: spec.num_bits + 64 / (written_group(spec, shape[1]) or shape[1]),
    config_keys=("quantization",),
    reader=Runner("mlx", ("mlx",), "'mlx[cpu]'"),
)
