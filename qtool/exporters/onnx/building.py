"""The decoder graph, built by ONNX Runtime's generative API (onnxruntime-genai) with our codes in the place of weights.

Its builder knows the architectures and the KV cache, and writes float graphs from transformers' models. It is given the
model with marks in the place of quantized weights (``marks.py``). Each product with marks then becomes ``MatMulNBits``,
and each look-up ``GatherBlockQuantized``, with the codes of the checkpoint, so that no weight is quantized again. Float
tensors get their published names; that of a tensor which the builder stored otherwise ends in what it did to it.
"""

import contextlib
import copy
import io
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.sections import ModelConfig
from qtool.exporters._folder import published_names, skeleton, write_folder
from qtool.exporters.onnx import packing
from qtool.exporters.onnx.marks import Marks, Rows
from qtool.models.expanded import put_float
from qtool.models.folders import read_config
from qtool.models.linears import packed_weights
from qtool.models.loading import load_model
from qtool.system.errors import RunError, first_line
from qtool.system.scratch import temporary_folder

# of the builder: each linear by itself, and keys of all tokens, also where a window hides some
OPTIONS = ("fuse_qkv=false", "fuse_mlp_gate_up=false", "windowed_kv_cache=false", "hf_token=false")
TRANSPOSED, PLUS_ONE = ".transposed", ".plus_one"  # ends of the names of float tensors that the builder changed
DOMAIN = "com.microsoft"
INLINE = 64  # bytes of the smallest tensor in the file beside the graph; shapes must be in the graph
Graph = Any  # an onnx_ir.Model; the package carries types, but is optional


def build(source: NativeCheckpoint) -> tuple[Graph, dict[str, Any]]:
    """Return the graph of ``source`` with its codes, and the content of ``genai_config.json``.

    Raises:
        RunError: the builder stopped, left a weight out, or stored it in a form that is not known.
    """
    model = load_model(ModelConfig(path=str(source.folder), dtype="float32", device="cpu"), quantized=True).model
    marks = Marks(source.shapes)
    for name, layer in packed_weights(model).items():
        put_float(model, name, layer, marks.of(name))
    graph, config = _built(source, model)
    _size_caches(graph, config["model"]["decoder"]["head_size"])
    _put_codes(graph, source, marks)
    _name_floats(graph, source)
    return graph, config


def plan(source: NativeCheckpoint) -> dict[str, Any]:
    """Return the content of ``genai_config.json``, from a graph whose weights are never read.

    Raises:
        RunError: the builder stopped.
    """
    return _built(source, copy.deepcopy(skeleton(source.folder)))[1]


def _built(source: NativeCheckpoint, model: nn.Module) -> tuple[Graph, dict[str, Any]]:
    """Return the graph that the builder makes of ``model``, and its config."""
    tied = not source.tables.embeddings and read_config(source.folder).get("tie_word_embeddings")
    with temporary_folder() as scratch, _builder() as builder:
        folder, out = scratch / "model", scratch / "out"
        folder.mkdir()
        write_folder(source.folder, folder, {}, None, "float32")
        given = (None, str(folder), str(out), "fp32", "cpu", str(scratch / "cache"))
        found: list[Graph] = []

        def load(self: Any, _path: str) -> nn.Module:
            self.embed_attrs["scale"] = _embedding_scale(model, self.embed_attrs["scale"])
            return model

        with _replaced(builder.Model, load_weights=load, save_model=lambda self, _out: found.append(self.model)):
            try:
                options = builder.parse_extra_options(
                    *given, [*OPTIONS, f"shared_embeddings={str(bool(tied)).lower()}"]
                )
                _spell_out(options["hf_details"]["hf_config"])
                builder.create_model(*given, **options)
            except Exception as error:  # errors of many kinds, for a model that it does not know after all
                raise RunError(
                    f"the builder of onnxruntime-genai stopped at this model: {type(error).__name__}: "
                    f"{first_line(error)}; export another format, for example dense"
                ) from error
        return found[0], json.loads((out / "genai_config.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _builder() -> Iterator[Any]:
    """Import the builder, which adds its folder to the search path and prints; nothing of that is left."""
    path = list(sys.path)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            from onnxruntime_genai.models import builder

            yield builder
        finally:
            sys.path[:] = path


@contextlib.contextmanager
def _replaced(owner: Any, **methods: Any) -> Iterator[None]:
    """Replace methods of a class for a while."""
    before = {name: getattr(owner, name) for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(owner, name, method)


def _spell_out(config: Any) -> None:
    """Give a config what the builder looks for: the two rotary bases of Gemma 3, and the layers that have a window."""
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    rope = config.rope_parameters
    if "sliding_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rope["full_attention"])


def _embedding_scale(model: Any, given: float) -> float:
    """Return the factor of the embedding in float32: the builder rounds that of Gemma to two decimals."""
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", None)
    return float(given) if scale is None else float(np.float32(scale))


def _size_caches(graph: Graph, head_size: int) -> None:
    """Say how many channels keys and values have, which the builder leaves open for quantized ones."""
    import onnx_ir as ir

    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.name.startswith(("past_key_values.", "present.")):
            value.shape = ir.Shape([*value.shape[:-1], head_size])


def _put_codes(graph: Graph, source: NativeCheckpoint, marks: Marks) -> None:
    """Replace each operator on marks by one on codes."""
    missing = {name: rows for name, (rows, _) in source.shapes.items()}
    for node in list(graph.graph):
        place = {"MatMul": (1, 0), "Gather": (0, 1)}.get(node.op_type)
        value = None if place is None else node.inputs[place[0]]
        if place is None or value is None or value.const_value is None:
            continue
        rows = marks.find(value.const_value.numpy(), place[1])
        if rows is not None:
            missing[rows.name] -= rows.length
            (_to_matmul if node.op_type == "MatMul" else _to_gather)(graph, node, source, rows)
            if not value.uses():
                graph.graph.initializers.pop(value.name)
    left = [name for name, count in missing.items() if count > 0]
    if left:
        raise RunError(f"the builder of onnxruntime-genai left rows of {left[0]} out; export another format")


def _to_matmul(graph: Graph, node: Any, source: NativeCheckpoint, rows: Rows) -> None:
    """Let a ``MatMul`` multiply by codes; sums are in float32 (``accuracy_level`` 0)."""
    parts, bits, block = _parts(graph, source, rows)
    columns = source.shapes[rows.name][1]
    sizes = {"K": columns, "N": rows.length, "bits": bits, "block_size": block, "accuracy_level": 0}
    _become(node, "MatMulNBits", [node.inputs[0], *parts], sizes)


def _to_gather(graph: Graph, node: Any, source: NativeCheckpoint, rows: Rows) -> None:
    """Let a ``Gather`` look codes up; they have two dimensions there, and three in a product."""
    import onnx_ir as ir

    (codes, *others), bits, block = _parts(graph, source, rows)
    shape = _initializer(graph, "qtool.rows_of_codes", lambda: torch.tensor([0, -1]), (2,), torch.int64)
    flat = ir.Value(name=f"{codes.name}.rows")
    reshape = ir.node("Reshape", [codes, shape], outputs=[flat], name=f"{node.name}/Reshape")
    graph.graph.insert_before(node, reshape)
    sizes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    _become(node, "GatherBlockQuantized", [flat, node.inputs[1], *others], sizes)


def _become(node: Any, kind: str, inputs: list[Any], attributes: dict[str, int]) -> None:
    """Change the operator, the inputs and the attributes of a node; its outputs stay."""
    import onnx_ir as ir

    node.op_type, node.domain = kind, DOMAIN
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)


def _parts(graph: Graph, source: NativeCheckpoint, rows: Rows) -> tuple[list[Any], int, int]:
    """Return the initializers of codes, scales and zero points of ``rows``, the bits of a code, and the block size."""
    spec, (total, columns) = source.specs[rows.name], source.shapes[rows.name]
    table = rows.name in source.tables.embeddings
    bits = (packing.GATHER if table else packing.MATMUL)[spec.num_bits]
    block = packing.block_size(spec, columns)
    assert block is not None
    blocks = columns // block

    @lru_cache(maxsize=1)
    def made() -> dict[str, Tensor]:
        quantized = source.quantized(rows.name)
        own = slice(rows.start, rows.start + rows.length)
        cut = quantized._replace(
            codes=quantized.codes[own], scale=quantized.scale[own], zero_point=quantized.zero_point[own]
        )
        return packing.packed(cut, bits, zeros=table)

    name = published_names(source).modules(rows.name)[0]
    stem = name if rows.length == total else f"{name}.rows_{rows.start}"
    shapes = {
        "qweight": ((rows.length, blocks, block * bits // 8), torch.uint8),
        "scales": ((rows.length, blocks), torch.float32),
        "qzeros": ((rows.length, -(-blocks * bits // 8)), torch.uint8),
    }
    if spec.symmetric and not table:
        del shapes["qzeros"]
    values = [
        _initializer(graph, f"{stem}.{part}", lambda part=part: made()[part], shape, dtype)
        for part, (shape, dtype) in shapes.items()
    ]
    return values, bits, block


def _initializer(graph: Graph, name: str, make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Return the initializer ``name``, which is made when the graph is saved; one that is there already is shared."""
    import onnx_ir as ir

    if name in graph.graph.initializers:
        return graph.graph.initializers[name]
    kind = {torch.uint8: ir.DataType.UINT8, torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64}[dtype]
    lazy = ir.LazyTensor(lambda: ir.Tensor(make().numpy(), name=name), dtype=kind, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy)
    graph.graph.register_initializer(value)
    return value


def _name_floats(graph: Graph, source: NativeCheckpoint) -> None:
    """Give float tensors their published names, by their content.

    Raises:
        RunError: a tensor of the checkpoint is not in the graph.
    """
    floats = published_names(source).floats({name: source.tensor(name) for name in source.float_names()})
    left = {name: tensor.float() for name, tensor in floats.items() if tensor.is_floating_point()}
    names: dict[str, Any] = {}
    for value in list(graph.graph.initializers.values()):
        if value.name.endswith((".qweight", ".scales", ".qzeros", "rows_of_codes")):
            continue
        array = torch.from_numpy(np.array(value.const_value.numpy()))
        if (named := _published_name(array, left)) is not None:
            names[named] = value
            del left[named.removesuffix(TRANSPOSED).removesuffix(PLUS_ONE)]
    for number, value in enumerate(names.values()):  # a new name may be the old one of another
        value.name = f"qtool.{number}"
    for name, value in names.items():
        if name in graph.graph.initializers:
            graph.graph.initializers[name].name = f"{name}.builder"
        value.name = name
    if left:
        raise RunError(f"the builder of onnxruntime-genai left {next(iter(left))} out; export another format")


def _published_name(array: Tensor, floats: dict[str, Tensor]) -> str | None:
    """Return the name of the first of ``floats`` that ``array`` holds, with its end; ``None``: it holds none."""
    for name, tensor in floats.items():
        if array.shape == tensor.shape and torch.equal(array, tensor):
            return name
        if tensor.dim() == 2 and array.shape == tensor.T.shape and torch.equal(array, tensor.T):
            return name + TRANSPOSED
        if array.shape == tensor.shape and tensor.dim() == 1 and torch.equal(array, 1 + tensor):
            return name + PLUS_ONE
    return None


def save(graph: Graph, file: Path) -> None:
    """Write the graph, with its tensors in a file beside it."""
    import onnx_ir as ir

    graph.producer_name = "qtool"
    graph.graph.sort()
    ir.save(graph, file, external_data=f"{file.name}.data", size_threshold_bytes=INLINE)
