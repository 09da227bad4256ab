"""``gguf``: one file for llama.cpp and software built on it, for the models of ``families.py``.

Each linear, and an embedding or head that is quantized, is written in the smallest type of GGUF that holds its codes,
scales and zero points exactly (``blocks.py``), so they may have different types; a weight that no type holds is
refused. The types are coarse: 2 and 3 bits in groups of fewer than 256 channels take the 4.5 bits of Q4_0, which a note
says. Norms and biases are float32, as llama.cpp needs them; float embeddings and heads keep their dtype. A head that
computes with the embedding's table is not written: llama.cpp reads the table in its place.

Tensor names come from the ``gguf`` package, which also writes the container. For some models llama.cpp expects rows in
another order than transformers, and norms with what the model adds to them (``layout.py``): for Llama, the two channels
of a rotary pair lie next to each other, and for transformers they are half a head apart.
"""

import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.sizes import bits_per_weight
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    float_tensors,
    float_zeros,
    inexact,
    packed_places,
    packed_tables,
    published_names,
    quantization_section,
    reader,
    regroup,
    skeleton,
    stored_dtype,
    unfit,
    write_folder,
)
from qtool.exporters._published import Place, Published, gathered, published
from qtool.exporters.gguf import blocks, families, layout, rotary, sampling, tokenizer
from qtool.exporters.gguf.families import FAMILIES, metadata
from qtool.exporters.gguf.layout import ROUTER, row_order
from qtool.models.folders import read_config
from qtool.system.distribution import install
from qtool.system.tensors import dtype_name
from qtool.system.version import __version__

FILE = "model.gguf"  # the file of an export that holds everything
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # types of GGUF by dtype


def _model(folder: Path) -> Any:
    """Return the config of the model in ``folder``."""
    return skeleton(folder).config


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse models and tokenizers that llama.cpp would compute otherwise, and grids and scales that no type holds."""
    if find_spec("gguf") is None:
        return f"this format needs the package gguf; install it with: {install('gguf')}"
    if refusal := float_zeros(source, "GGUF") or families.refuses(_model(source.folder)):
        return refusal
    names, there = published_names(source), tensor_map(source.folder)
    keys = [names.name(name) for name in source.float_names() if name.removesuffix(".weight") not in names.experts]
    for name in (*keys, *(f"{name}.weight" for name in _packed(source))):
        if name not in there:
            return f"GGUF has no tensor for {name} in a {_model(source.folder).model_type} model; export dense instead"
    read = FAMILIES[_model(source.folder).model_type].biases
    for name in keys:
        if name.endswith(".bias") and there[name].split(".")[-2] not in read:
            return f"llama.cpp does not read {name} of a {_model(source.folder).model_type} model; export dense instead"
    for name in source.specs:
        if refusal := _misfit(source, name):
            return refusal
        if inexact([source.tensor(f"{name}.weight_scale")], "float16"):
            return f"{name}.weight_scale has values that float16 does not hold; quantize with scale_dtype: float16"
        if any(ROUTER in there[key] for key in names.keys(name) if key in there):
            return f"{name} chooses experts, and llama.cpp reads it in float32; skip it (quant.overrides)"
    return unfit(source, config) or tokenizer.refuses(source.folder, _model(source.folder).vocab_size)


def _misfit(source: NativeCheckpoint, name: str) -> str | None:
    """Return the reason why no type holds the weight ``name``, and what to do, or ``None``."""
    spec, columns = source.specs[name], int(source.tensor(f"{name}.weight_shape")[1])
    if (block := blocks.choose(spec, columns)) is not None:
        there = tensor_map(source.folder).get(f"{published_names(source).modules(name)[0]}.weight", "")
        order = layout.column_order(there, columns, _model(source.folder))
        if order is None or all(part.max() - part.min() == block.length - 1 for part in order.split(block.length)):
            return None
        return (
            f"llama.cpp expects the input channels of {name} in another order, by heads of linear attention, and "
            f"{block.name} has blocks of {block.length} channels that lie in several heads; give it groups of at most "
            f"{_model(source.folder).linear_value_head_dim} channels on an affine grid (quant.overrides)"
        )
    group = columns // spec.num_groups(columns)
    if group % 32:
        return (
            f"{name} has groups of {group} input channels, and blocks of GGUF have 32 or 256; {regroup(source, name)}"
        )
    return (
        f"{name} is {spec.label()}, and no type of GGUF holds {spec.num_bits} bits with a zero point exactly; quantize "
        f"it with symmetric: true, or with at most 4 bits ({packed_tables(source).get(name, 'quant.overrides')})"
    )


def places(names: Published) -> dict[str, Place]:
    """Return where the file holds linears: the experts of a layer in stacks, under the names that ``gguf`` maps."""
    return names.stacks(lambda parent, part: f"{parent.replace('.block_sparse_moe', '.mlp')}.experts.{part}.weight")


def _packed(source: NativeCheckpoint) -> dict[str, Place]:
    return packed_places(source, places(published_names(source)))


def tensor_map(folder: Path) -> dict[str, str]:
    """Return the names of tensors in a GGUF file by their published names, or those of stacks; some may have none."""
    return _tensor_map(skeleton(folder))


@lru_cache(maxsize=2)  # called for every tensor
def _tensor_map(model: nn.Module) -> dict[str, str]:
    import gguf

    config: Any = model.config
    architectures = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[FAMILIES[config.model_type].architecture], config.num_hidden_layers)
    known = published(model)
    tensors = {known.name(name) for name in model.state_dict() if name not in known.experts} | places(known).keys()
    known_as = {
        name: name.replace(".dt_bias", ".dt_proj.bias").replace(".layer_scalar", ".layer_scalar.weight")
        for name in sorted(tensors)
    }
    found = {name: names.get_name(key, try_suffixes=(".weight", ".bias")) for name, key in known_as.items()}
    return {name: there for name, there in found.items() if there is not None}


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write ``model.gguf``, and beside it the config and tokenizer of the checkpoint; see ``Exporter.write``."""
    import gguf

    model, names, there = _model(source.folder), published_names(source), tensor_map(source.folder)
    floats, dtype = float_tensors(source, config, stored_dtype(source))
    write_folder(source.folder, out, {}, None, dtype)
    writer = begun(source.folder, out)
    add_floats(writer, source.folder, names.floats(floats, places(names)))
    sizes: dict[str, Counter[tuple[str, blocks.Block]]] = {}
    weight, tables = reader(source), packed_tables(source)
    for name, place in _packed(source).items():
        quantized = gathered(place, weight)
        block = blocks.choose(quantized.spec, quantized.codes.shape[1])
        assert block is not None, name
        columns = layout.column_order(there[f"{name}.weight"], quantized.codes.shape[1], model)
        packed = _moved(blocks.pack(quantized, block), columns, block)
        order = row_order(there[f"{name}.weight"], len(packed), model)
        rows = (packed if order is None else packed[order]).unflatten(0, place.shape)
        _add(writer, there[f"{name}.weight"], rows, block.name, None)
        linear = next(iter(place.linears))
        part = linear if linear in tables else ""  # linears are counted together
        sizes.setdefault(part, Counter())[quantized.spec.label(), block] += quantized.codes.numel()
    types: Counter[str] = Counter()
    # llama.cpp, too, names a file by its linears: a Q4_0 file has tables of 6 or 8 bits
    for (_, block), size in sizes.get("", next(iter(sizes.values()))).items():
        types[block.name] += size
    common = types.most_common(1)[0][0]
    kind = "" if common not in ("Q3_K", "Q4_K", "Q5_K") else "_S" if len(types) == 1 else "_M"  # M: a mixture
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{common}{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    finish(writer, out)
    return _notes(source, model, sizes)


def add_floats(writer: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:  # Any: a gguf.GGUFWriter
    """Add ``tensors``, by published name, of the model in ``folder``, and the factors of its rotary embedding."""
    model, there = _model(folder), tensor_map(folder)
    for name, tensor in tensors.items():
        held = layout.held(there[name], tensor.T if name in _transposed(folder) else tensor, model)
        if (columns := layout.column_order(there[name], held.shape[-1], model)) is not None:
            held = held[:, columns]
        kind = FLOATS[dtype_name(held.dtype)]
        _add(writer, there[name], held.contiguous(), kind, row_order(there[name], len(held), model))
    for name, tensor in rotary.tensors(model).items():
        _add(writer, name, tensor, "F32", None)


def finish(writer: Any, out: Path) -> None:  # Any: a gguf.GGUFWriter
    """Write the file, and make it durable."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (out / FILE).open("rb") as written:
        os.fsync(written.fileno())


def _moved(packed: Tensor, order: Tensor | None, block: blocks.Block) -> Tensor:
    """Return ``packed`` with its input channels in ``order``, which moves whole blocks (``_misfit``)."""
    if order is None:
        return packed
    parts = packed.unflatten(1, (-1, block.num_bytes))
    return torch.flatten(parts[:, order[:: block.length] // block.length], 1)


def _transposed(folder: Path) -> set[str]:
    """Return the published names of weights that the float model stores as ``[in, out]`` (GPT-2's ``Conv1D``)."""
    names = published(skeleton(folder))
    return {key for key, place in names.places.items() if place.column == 0 and len(place.shape) == 1}


def begun(folder: Path, out: Path) -> Any:  # Any: a gguf.GGUFWriter
    """Return a writer of ``model.gguf`` with the metadata of the model in ``folder``, and no tensors."""
    import gguf

    model = _model(folder)
    family = FAMILIES[model.model_type]
    writer = gguf.GGUFWriter(out / FILE, family.architecture)
    writer.add_name(f"{tokenizer.model_name(folder, model.model_type)} quantized by qtool {__version__}")
    for key, kind, value in metadata(model):
        if (figure := value(model)) is not None:
            getattr(writer, f"add_{kind}")(f"{family.architecture}.{key}", figure)
    tokenizer.add(writer, folder, model.vocab_size)
    sampling.add(writer, folder)
    return writer


def describe(source: NativeCheckpoint, out: Path, dtype: str) -> None:
    """Write the folder with the metadata and the tokenizer, without weights; see ``Exporter.describe``."""
    write_folder(source.folder, out, {}, None, dtype)
    writer = begun(source.folder, out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _add(writer: Any, name: str, tensor: Tensor, kind: str, order: Tensor | None) -> None:  # Any: a gguf.GGUFWriter
    """Add a tensor of the type ``kind`` with its rows in ``order``; as bytes if numpy has no such type."""
    import gguf

    rows = tensor if order is None else tensor[order]
    as_bytes = kind not in ("F32", "F16")
    array = (rows.view(torch.uint8) if as_bytes else rows).numpy()
    writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])


def _notes(source: NativeCheckpoint, model: Any, sizes: dict[str, Counter[tuple[str, blocks.Block]]]) -> list[str]:
    """Return the notes for users of the file; ``sizes`` are the weights by table, and under ``""`` those of linears."""
    notes, shapes, tables = [], source.shapes, packed_tables(source)
    for part, counts in sorted(sizes.items()):
        specs = {name: spec for name, spec in source.specs.items() if name == part or (not part and name not in tables)}
        own = bits_per_weight(specs, {name: shapes[name] for name in specs})
        written = sum(block.bits * size for (_, block), size in counts.items()) / counts.total()
        kinds = ", ".join(f"{label} as {block.name} ({block.bits:g})" for label, block in counts)
        said = f"{written:.2f} bits per weight as written, {own:.2f} in the checkpoint: {kinds}"
        notes.append(f"{part}: {said}" if part else said)
    if any(block.name == "Q4_0" and not label.startswith("w4") for counts in sizes.values() for label, block in counts):
        notes.append(
            "2 and 3 bits fill 4.5 in Q4_0; with one group per row, or groups of a multiple of 256 channels, 2 bits "
            "would take 2.06 bits (asymmetric: 2.63), and 3 symmetric bits 3.44"
        )
    notes.append(
        "llama.cpp rounds the input of each linear to 8 bits, so its results differ a little from other readers'"
    )
    window = getattr(model, "sliding_window", None)
    if window and window < model.max_position_embeddings and not FAMILIES[model.model_type].windows:
        notes.append(f"llama.cpp attends to the whole text, and this model over {window} tokens: keep texts that short")
    if rotary.tensors(model) or getattr(model, "attention_bias", False):
        notes.append("transformers' own reader of GGUF leaves out biases and scaled rotary frequencies of Llama")
    if tokenizer.composes(source.folder):
        notes.append("the tokenizer composes characters (Unicode NFC) first, and llama.cpp does not: give it NFC text")
    if unstripped := tokenizer.unstripped(source.folder):
        notes.append(f"llama.cpp leaves spaces beside {', '.join(unstripped)} in the text: write none there")
    return notes


class GGUFFolder(WrittenFolder):
    """A written folder with ``model.gguf``, opened once."""

    def __init__(self, folder: Path) -> None:
        """Read the file's metadata, which is slow because of the vocabulary; tensors are mapped."""
        import gguf

        self.folder = folder
        self.reader: Any = gguf.GGUFReader(folder / FILE)  # Any: the package carries no types
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self._places = tensor_map(folder)

    def names(self) -> list[str]:
        """Return the published names, or those of stacks, of all tensors of the file."""
        return [name for name, there in self._places.items() if there in self._tensors]

    def packed(self) -> set[str]:
        """Return the names of linears that the file holds in a quantized type."""
        kinds = {name: self._tensors[self._places[name]].tensor_type.name for name in self.names()}
        return {name.removesuffix(".weight") for name, kind in kinds.items() if kind not in FLOATS.values()}

    def rows(self, name: str) -> Tensor:
        """Return a tensor in float32, dequantized by the ``gguf`` package, with its rows in the float model's order."""
        import gguf

        there = self._places[name]
        found = self._tensors[there]
        values = torch.from_numpy(np.require(gguf.dequantize(found.data, found.tensor_type), np.float32, "W"))
        order = row_order(there, len(values), _model(self.folder))
        columns = layout.column_order(there, values.shape[-1], _model(self.folder))
        values = values if order is None else values[torch.argsort(order)]
        return values if columns is None else values[:, torch.argsort(columns)]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in float32 as the float model holds it."""
        values = layout.given_back(self._places[name], self.rows(name), _model(self.folder))
        return values.T.contiguous() if name in _transposed(self.folder) else values

    def same(self, name: str, tensor: Tensor) -> bool:
        """Return whether the file holds what is written of ``tensor``, for example the sum of a norm's weight and 1."""
        there, model = self._places[name], _model(self.folder)
        return torch.equal(
            layout.given_back(there, layout.held(there, tensor, model), model), self.tensor(name).float()
        )

    def dtype(self) -> torch.dtype:
        """Return the dtype that ``config.json`` names: dequantized tensors are float32, whatever the file holds."""
        found: torch.dtype = getattr(torch, read_config(self.folder)["dtype"])
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, and each figure of the file that differs from it, under the file's key."""
        model = _model(self.folder)
        prefix = FAMILIES[model.model_type].architecture
        found = {}
        for key, kind, value in metadata(model):
            field = self.reader.fields.get(f"{prefix}.{key}")
            stored, figure = None if field is None else field.contents(), value(model)
            if kind == "float32" and figure is not None:
                figure = float(np.float32(figure))
            if stored != figure:
                found[key] = stored
        return read_config(self.folder) | found


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the float32 rows ``[rows, in]`` of the linear, or of the stack of experts, ``name``."""
    assert isinstance(opened, GGUFFolder)
    return opened.rows(f"{name}.weight").flatten(0, -2)


def recognises(folder: Path) -> bool:
    """Return whether ``model.gguf`` is all that a folder has of weights."""
    quantized = quantization_section(folder) or read_config(folder).get("quantization")
    return not quantized and (folder / FILE).exists() and not any(folder.glob("*.safetensors"))


EXPORTER = Exporter(
    "GGUF, for llama.cpp",
    refuses,
    write,
    describe,
    read,
    "Load `model.gguf` with llama.cpp, or with software built on it.",
    GGUFFolder,
    places,
    recognises,
    library="gguf",
    weight_files="*.gguf",
    bits=lambda spec, shape, table: (
        block.bits if (block := blocks.choose(spec, shape[1])) else spec.bits_per_weight(shape[1])
    ),
    reads_with="gguf",
)
