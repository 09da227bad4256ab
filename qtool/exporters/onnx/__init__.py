"""``onnx``: a decoder graph with KV cache for ONNX Runtime, whose weights stay packed (``MatMulNBits``).

The folder has ``model.onnx``, its tensors in ``model.onnx.data``, ``genai_config.json`` for onnxruntime-genai, and the
config and tokenizer of the checkpoint. The graph is built by onnxruntime-genai (``building.py``) and computes in
float32; codes of 2, 4 and 8 bits are the checkpoint's, and those of 3 bits are written as 4, which changes no weight.
Blocks of ONNX Runtime have a power of two of inputs; a group of another size is written as several blocks with the same
scale. Scales are float32, as the graph's numbers are. Before the folder gets its name ONNX Runtime computes logits with
it, of a prompt and of tokens after it.
"""

from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.config.sections import ExportConfig
from qtool.exporters._base import Exporter
from qtool.exporters._folder import (
    WrittenFolder,
    conv1d,
    float_zeros,
    packed_tables,
    published_names,
    regroup,
    skeleton,
    unfit,
    write_folder,
)
from qtool.exporters.onnx import building, packing
from qtool.exporters.onnx.marks import LIMIT
from qtool.exporters.onnx.reading import FILE, GENAI, ONNXFolder, logits
from qtool.system.distribution import install

PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
# model types whose graphs, as onnxruntime-genai 0.18 builds them, compute what transformers computes
FAMILIES = ("ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
ROPES = {"llama": ("llama3",), "phi3": ("longrope",)}  # scaled rotary embeddings that it computes, by model type


def refuses(source: NativeCheckpoint, config: ExportConfig) -> str | None:
    """Refuse models that are not tested, zero points between codes, small blocks, and dtypes other than float32."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        return f"this format needs the package {missing[0].replace('_', '-')}; install it with: {install('onnx')}"
    if refusal := _model_refuses(skeleton(source.folder)):
        return refusal
    if refusal := float_zeros(source, "the onnx export") or conv1d(source, "whose weight is transposed"):
        return refusal
    if refusal := unfit(source, config):
        return refusal
    if config.dtype not in ("auto", "float32"):
        return f"its graph computes in float32, so that dtype: {config.dtype} would change nothing; use dtype: auto"
    names, shapes = published_names(source), source.shapes
    if sum(rows for rows, _ in shapes.values()) > LIMIT:
        return f"its quantized weights have more than {LIMIT} rows; export another format"
    for name, spec in source.specs.items():
        if len(names.keys(name)) > 1 or names.places[names.keys(name)[0]].whole != name:
            return f"{name} is not one tensor in published checkpoints; export another format, for example dense"
        if packing.block_size(spec, shapes[name][1]) is None:
            group = shapes[name][1] // spec.num_groups(shapes[name][1])
            why = f"{name} has groups of {group} input channels, and blocks of ONNX Runtime are powers of two from 16"
            return f"{why}; {regroup(source, name)}"
    return None


def _model_refuses(model: Any) -> str | None:
    """Return the reason why the builder's graph would not compute a model, or ``None``."""
    kind, rope = model.config.model_type, getattr(model.config, "rope_parameters", None) or {}
    if kind not in FAMILIES:
        return f"its model_type is {kind}, and qtool writes ONNX graphs of {', '.join(FAMILIES)}; export dense instead"
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        name = each.get("rope_type", "default")
        if name not in ("default", *ROPES.get(kind, ())):
            return (
                f"its rotary embedding is scaled ({name}), and onnxruntime-genai does not compute that for {kind} as "
                "transformers does; export dense instead"
            )
    return None


def write(source: NativeCheckpoint, out: Path, config: ExportConfig) -> list[str]:
    """Write the folder; see ``Exporter.write``."""
    graph, genai = building.build(source)
    write_folder(source.folder, out, {}, None, "float32")
    write_json(out / GENAI, genai)
    building.save(graph, out / FILE)
    return _notes(source)


def describe(source: NativeCheckpoint, out: Path, dtype: str) -> None:
    """Write the configs and the tokenizer, after building the graph without weights; see ``Exporter.describe``."""
    write_folder(source.folder, out, {}, None, dtype)
    write_json(out / GENAI, building.plan(source))


def _notes(source: NativeCheckpoint) -> list[str]:
    """Return the notes of a folder."""
    notes, shapes, tables = (
        ["the graph computes in float32, and float tensors are stored so"],
        source.shapes,
        packed_tables(source),
    )
    sizes, bits = Counter[str](), defaultdict[str, float](float)
    for name, spec in source.specs.items():
        part, count = name if name in tables else "linears", shapes[name][0] * shapes[name][1]
        sizes[part] += count
        bits[part] += count * _bits(spec, shapes[name], name in source.tables.embeddings)
    notes += [f"{part}: {bits[part] / sizes[part]:.2f} bits per weight as written" for part in sizes]
    if any(spec.num_bits == 3 for spec in source.specs.values()):
        notes.append("3-bit codes are written as 4-bit ones, which changes no weight")
    return notes


def _bits(spec: QuantSpec, shape: tuple[int, int], table: bool) -> float:
    """Return the bits per weight as written; an embedding of any grid has zero points."""
    held = (packing.GATHER if table else packing.MATMUL)[spec.num_bits]
    block = packing.block_size(spec, shape[1]) or shape[1]
    return held + (32 + (0 if spec.symmetric and not table else held)) / block


def read(opened: WrittenFolder, name: str) -> Tensor:
    """Return the weight float32 ``[out, in]`` of the linear or embedding ``name``, unpacked from the file."""
    assert isinstance(opened, ONNXFolder)
    return opened.weight(name)


def recognises(folder: Path) -> bool:
    """Return whether ``model.onnx`` is all that a folder has of weights."""
    return all((folder / name).exists() for name in (FILE, GENAI)) and not any(folder.glob("*.safetensors"))


EXPORTER = Exporter(
    "a decoder graph with packed weights, for ONNX Runtime",
    refuses,
    write,
    describe,
    read,
    "Load the folder with `onnxruntime-genai`, or run `model.onnx` with ONNX Runtime.",
    ONNXFolder,
    recognises=recognises,
    library="onnx",
    weight_files=f"{FILE}*",
    bits=_bits,
    runs=logits,
)
