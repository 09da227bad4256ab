"""The size of a packed checkpoint, before it is written: bits per weight, shapes of packed tensors, bytes of files."""

import json
import math

import torch
from torch import Tensor

from qtool.checkpoints.native import NativeCheckpoint
from qtool.config.quant import QuantSpec
from qtool.models.loaded import LoadedModel
from qtool.models.tables import head_of, tied_to
from qtool.quant.packed_linear import PackedLinear

HEADER_BYTES = 64  # most bytes of a safetensors header, without the list of tensors


def bits_per_weight(specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> float:
    """Return the average number of stored bits of the weights ``specs``; scales and zero points are counted."""
    sizes = {name: math.prod(shapes[name]) for name in specs}
    bits = sum(spec.bits_per_weight(shapes[name][1]) * sizes[name] for name, spec in specs.items())
    return bits / sum(sizes.values())


def linear_bits(source: NativeCheckpoint) -> float:
    """Return ``bits_per_weight`` of the linears of the decoder blocks, without embeddings and head.

    Of a checkpoint of ``model.free``, and of one that has no such linears, it is that of all quantized weights.
    """
    return bits_per_weight(source.tables.linears(source.specs) or source.specs, source.shapes)


def file_bits(source: NativeCheckpoint) -> float:
    """Return the bits of all weight files for each weight of the float model; a tied embedding and head count once."""
    shapes = source.shapes.values()
    weights = sum(map(math.prod, shapes)) + sum(source.tensor(name).numel() for name in source.float_names())
    return 8 * source.num_bytes() / weights


def packed_parts(name: str, spec: QuantSpec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return the tensors of a quantized linear of ``shape`` ``(out, in)`` by full name, on the meta device."""
    with torch.device("meta"):
        return {f"{name}.{part}": tensor for part, tensor in PackedLinear(*shape[::-1], spec).state_dict().items()}


def planned_bytes(loaded: LoadedModel, specs: dict[str, QuantSpec], shapes: dict[str, tuple[int, int]]) -> int:
    """Return an upper bound on the size of weight files with the grids ``specs``, headers included.

    Norms and biases are counted in float32, since methods that change them may store float32. A table that the head
    computes with is counted once.
    """
    tensors: dict[str, Tensor] = {}
    head, tied = head_of(loaded.model), tied_to(loaded.model)
    packed = {*specs, *(tied[:1] if tied is not None and tied[1] in specs else ())}
    state = {
        name: t
        for name, t in loaded.model.state_dict(keep_vars=True).items()
        if name.removesuffix(".weight") not in packed
    }
    # tied tensors count once, under the first name; on the meta device none has an address
    stored = {(id(t) if t.is_meta else t.data_ptr(), t.shape): name for name, t in reversed(state.items())}
    for name in stored.values():
        dtype = loaded.file_dtypes.get(name, state[name].dtype)
        grows = dtype.is_floating_point and state[name].dim() < 2
        tensors[name] = state[name].to("meta", torch.promote_types(dtype, torch.float32) if grows else dtype)
    for name, spec in specs.items():
        tensors |= packed_parts(name, spec, shapes[name])
    size = sum(t.nbytes for t in tensors.values())
    listed = {name: {"dtype": "BF16", "shape": [*t.shape], "data_offsets": [size, size]} for name, t in tensors.items()}
    num_files = len(loaded.blocks()) + 1 + (head is not None and head[0] in specs)  # an untied head has its own
    return size + len(json.dumps(listed, separators=(",", ":"))) + HEADER_BYTES * num_files
