"""``gemma``: the packed layout of transformers' own quantizer of that name, which needs no further package.

The quantizer is named after the models that it was made for, and loads any model of linears (transformers 5.12 or
later). A linear ``p`` with ``K`` inputs, ``N`` outputs and one symmetric grid of 2, 4 or 8 bits for each row has
``p.weight``, ``p.weight_scale`` float32 ``[N, 1]``, and ``p.input_activation_scale`` and ``p.output_activation_scale``,
whose 0.0 means that activations are not rounded. ``p.weight`` is int8 ``[N, K]`` at 8 bits; at 2 and 4 bits it is uint8
``[N, ceil(K b / 8)]``, with the code of the first input in the lowest bits of a byte. 3-bit codes are written as 4-bit
ones, which changes no weight. An embedding ``e`` has ``e.embedding_quantized`` and ``e.embedding_scale`` instead.

transformers unpacks a weight at each use, in the dtype of the model, and multiplies by the scale in that dtype. So the
config names float32 unless the user asks for another dtype; float tensors keep the checkpoint's own dtype in the files.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
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
    row_parts,
    skeleton,
    split_rows,
    stored_dtype,
    unfit,
    write_folder,
)
from qtool.exporters._outside import Runner
from qtool.exporters._published import gathered, published
from qtool.exporters._tables import float_embeddings, names_of
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import pack
from qtool.system.errors import InputError

HELD = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code as written, by the bits of the grid
ACTIVATIONS = ("input_activation_scale", "output_activation_scale")


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse zero points, groups within a row, experts, ``Conv1D`` layers and tied packed tables."""
    if refusal := float_zeros(source, "gemma") or conv1d(source, "and the gemma quantizer replaces nn.Linear only"):
        return refusal
    shapes, tables = source.shapes, packed_tables(source)
    for name, spec in source.specs.items():
        key = tables.get(name, "quant")
        if not spec.symmetric:
            return f"{name} is {spec.label()}, and the gemma quantizer has no zero points; set symmetric: true ({key})"
        if spec.num_groups(shapes[name][1]) > 1:
            return (
                f"{name} is {spec.label()}, and the gemma quantizer has one scale for each output channel; set "
                f"group_size: -1 ({key})"
            )
    if refusal := _tables_refuse(source):
        return refusal
    expert = next((name for name in source.specs if name in published_names(source).experts), None)
    if expert is not None:
        return (
            f"{expert} holds the experts of a layer, and the gemma quantizer replaces linears only; export "
            "compressed-tensors or dense instead"
        )
    return split_rows(source, "gemma") or unfit(source, config)


def _tables_refuse(source: NativeCheckpoint) -> str | None:
    """Return the reason why transformers would not compute with a packed embedding, or ``None``."""
    for head, table in source.tables.tied.items():
        return (
            f"{head} computes with the packed table {table} (tied weights), and the gemma quantizer packs a head only "
            "if it has a table of its own; quantize with quant.embedding: float, or export dense"
        )
    for name in source.tables.embeddings:
        module = published_names(source).model.get_submodule(name)
        if type(module) is not nn.Embedding and not hasattr(module, "scalar_embed_scale"):
            return (
                f"{name} is quantized (quant.embedding), and the gemma quantizer replaces nn.Embedding, where this is "
                f"{type(module).__name__}; quantize with quant.embedding: float, or export dense"
            )
    return None


def section(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the ``quantization_config``: the most common bits, modules with others, and those left in float.

    transformers looks for its own names of modules; both these and the published ones are listed.
    """
    bits = {name: HELD[spec.num_bits] for name, spec in source.specs.items()}
    common = Counter(bits.values()).most_common(1)[0][0]
    others: dict[int, list[str]] = {}
    for name, own in bits.items():
        if own != common:
            others.setdefault(own, []).extend(names_of(source, name))
    floats = both_names(float_linears(source))
    packs_embeddings = bool(source.tables.embeddings)
    return {
        "quant_method": "gemma",
        "num_bits": common,
        "quantize_embeddings": packs_embeddings,
        "module_quant_configs": {_pattern(names): {"num_bits": own} for own, names in others.items()},
        "modules_to_not_convert": floats + (float_embeddings(source) if packs_embeddings else []),
    }


def _pattern(names: list[str]) -> str:
    """Return a regular expression that matches ``names`` as a whole, and no other name."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def packed(quantized: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the packed codes and the scales of a symmetric weight with one scale for each row."""
    codes, scale, _, spec = quantized
    bits = HELD[spec.num_bits]
    held = codes.to(torch.int16) - spec.middle  # the value of a code in steps of the scale
    if bits == 8:
        return held.to(torch.int8), scale.float()
    words = pack(held + (1 << (bits - 1)), bits)
    return words.view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous(), scale.float()


def _parts(name: str, quantized: QuantizedWeight, *, embedding: bool) -> dict[str, Tensor]:
    """Return the tensors of the linear or embedding ``name``."""
    weight, scale = packed(quantized)
    if embedding:
        return {f"{name}.embedding_quantized": weight, f"{name}.embedding_scale": scale}
    zeros = {f"{name}.{part}": torch.tensor(0.0) for part in ACTIVATIONS}
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale, **zeros}


def _dtype(config: ExportConfig) -> str:
    """Return the dtype of the config, in which transformers computes weights."""
    return "float32" if config.dtype == "auto" else config.dtype


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    floats, _ = float_tensors(source, config, stored_dtype(source))
    tensors, read = published_names(source).floats(floats), reader(source)
    for name, place in packed_places(source).items():
        table = place.linears.keys() <= set(source.tables.embeddings)
        tensors |= _parts(name, gathered(place, read), embedding=table)
    dtype = _dtype(config)
    write_folder(source.folder, out, tensors, section(source), dtype)
    notes = []
    if any(spec.num_bits == 3 for spec in source.specs.values()):
        notes.append("3-bit codes are written as 4-bit ones, which changes no weight")
    if dtype == "float32":
        notes.append("weights are exact in float32, which config.json names; in 16 bits transformers rounds them")
    else:
        notes.append(f"transformers unpacks weights in {dtype}, which rounds them; in float32 they are exact")
    return notes


class GemmaFolder(WrittenFolder):
    """A folder whose packed weights have scales, under one name in linears and another in embeddings."""

    def packed(self) -> set[str]:
        """Return the names of the quantized linears and embeddings."""
        ends = (".weight_scale", ".embedding_scale")
        return {name.rpartition(".")[0] for name in self.names() if name.endswith(ends)}


def _bits(config: Mapping[str, Any], name: str) -> Any:
    """Return the bits of a module: those of the first pattern that is found in its name, or of all modules."""
    for pattern, changes in (config.get("module_quant_configs") or {}).items():
        if re.search(pattern, name):
            return changes.get("num_bits", config.get("num_bits"))
    return config.get("num_bits")


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear or embedding ``name``."""
    held = set(opened.names())
    stem = "embedding" if f"{name}.embedding_scale" in held else "weight"
    codes = opened.tensor(f"{name}.embedding_quantized" if stem == "embedding" else f"{name}.weight")
    scale = opened.tensor(f"{name}.{stem}_scale")
    bits = _bits(opened.config["quantization_config"], name)
    for part in ACTIVATIONS:
        if f"{name}.{part}" in held and opened.tensor(f"{name}.{part}").any():
            raise InputError(f"{opened.folder}: {name} rounds activations by {part}, which qtool does not compute")
    known = codes.dtype == torch.int8 if bits == 8 else bits in (2, 4) and codes.dtype == torch.uint8
    if not known or scale.shape != (len(codes), 1):
        raise InputError(
            f"{opened.folder}: {name} has {codes.dtype} codes of {bits} bits and scales {list(scale.shape)}, which "
            "qtool cannot read"
        )
    return unpacked(codes, scale, bits, _columns(opened, name, codes.shape[1] * 8 // bits))


def _columns(opened: WrittenFolder, name: str, most: int) -> int:
    """Return the number of inputs of a linear, or of channels of an embedding; ``most`` is what its bytes hold."""
    names = published(skeleton(opened.folder))
    if (place := names.places.get(f"{name}.weight")) is None:
        return most
    module: Any = names.model.get_submodule(next(iter(place.linears)))
    return min(most, module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features)


def unpacked(codes: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """Return the weight float32 ``[rows, columns]`` of packed ``codes`` and ``scale`` ``[rows, 1]``."""
    if bits == 8:
        return codes.float() * scale
    found, per_byte = torch.empty(len(codes), columns), 8 // bits
    base = 2**bits
    for rows in row_parts(found):
        rest, digits = codes[rows].to(torch.int32), []
        for _ in range(per_byte):  # digits of a byte, least first
            digits.append(rest % base)
            rest = rest // base
        found[rows] = (torch.stack(digits, -1).flatten(1)[:, :columns] - base // 2) * scale[rows]
    return found


EXPORTER = Exporter(
    "transformers' own quantizer: symmetric, one scale per row",
    refuses,
    write,
    lambda source, out, dtype: write_folder(source.folder, out, {}, section(source), dtype),
    read,
    "Load it with `transformers` 5.12 or later; nothing else is needed.",
    GemmaFolder,
    recognises=partial(names_method, "gemma"),
    bits=lambda spec, shape, table: HELD[spec.num_bits] + 32 / shape[1],
    reader=Runner("gemma", ("transformers",)),
)
