"""The weights of a report: the linears and embeddings, their shapes and grids, and the errors of quantized ones."""

from collections.abc import Collection, Mapping

from torch import nn

from qtool.checkpoints.native import NativeCheckpoint
from qtool.checkpoints.sizes import packed_parts
from qtool.config.quant import QuantSpec
from qtool.config.sections import ModelConfig
from qtool.models.kept_float import other_matrices
from qtool.models.linears import linear_shapes, packed_weights, stored_weight
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.tables import embeddings_of, head_of, tied_to
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_embedding import can_stand_for
from qtool.quant.packed_linear import PackedLinear
from qtool.reports.records import Linear, ModelTable
from qtool.system import memory
from qtool.system.tensors import dtype_name


def block_linears(loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    """Return the shape ``(out, in)`` of every linear in the decoder blocks by full name, then of other matrices."""
    matrices = other_matrices(loaded.blocks())
    return linear_shapes(loaded.blocks()) | {
        name: (p.numel() // p.shape[-1], p.shape[-1]) for name, p in matrices.items()
    }


def linear_records(
    shapes: dict[str, tuple[int, int]], source: NativeCheckpoint, errors: dict[str, float]
) -> tuple[Linear, ...]:
    """Return the records of the linears ``shapes``; a linear without a grid in ``source`` stays in floating point."""
    specs, floats = source.specs, set(source.float_names())
    return tuple(
        Linear(name=name, shape=shape, float_bytes=_float_bytes(source, floats, name))
        if name not in specs
        else Linear(
            name=name,
            shape=shape,
            num_bits=specs[name].num_bits,
            grid=specs[name].label(),
            weight_error=errors.get(name),
        )
        for name, shape in shapes.items()
    )


def _float_bytes(source: NativeCheckpoint, floats: Collection[str], name: str) -> int | None:
    """Return the bytes in files of a float linear, or of a matrix that is a parameter; ``None`` if it has no tensor."""
    stored = next((each for each in (f"{name}.weight", name) if each in floats), None)
    return None if stored is None else source.tensor(stored).nbytes


def table_records(loaded: LoadedModel, source: NativeCheckpoint, errors: Mapping[str, float]) -> tuple[ModelTable, ...]:
    """Return the records of the embeddings and of the head of ``loaded``, whose checkpoint is ``source``."""
    head, tied = head_of(loaded.model), tied_to(loaded.model)
    tokens = loaded.model.get_input_embeddings()
    found = []
    for name, module in embeddings_of(loaded.model).items():
        role = "embedding" if module is tokens else f"embedding {name.rpartition('.')[2]}"
        reader = tied[0] if tied is not None and tied[1] == name else ""
        shape = (module.num_embeddings, module.embedding_dim)
        role = "embedding and head (tied)" if reader else role
        found.append(_table(source, (name, reader), role, shape, can_stand_for(module), errors))
    if head is not None and tied is None and isinstance(head[1], nn.Linear | PackedLinear):
        shape = (head[1].out_features, head[1].in_features)
        found.append(_table(source, (head[0],), "head", shape, True, errors))
    return tuple(each for each in found if each is not None)


def named_tables(roles: Mapping[str, str], source: NativeCheckpoint) -> tuple[ModelTable, ...]:
    """Return the records of float embeddings and heads of a model without a class, by their ``roles``."""
    found = []
    for name, role in roles.items():
        rows, columns = source.tensor(f"{name}.weight").shape
        found.append(_table(source, (name,), role, (rows, columns), False, {}))
    return tuple(each for each in found if each is not None)


def _table(
    source: NativeCheckpoint,
    names: tuple[str, ...],
    role: str,
    shape: tuple[int, int],
    can_be_packed: bool,
    errors: Mapping[str, float],
) -> ModelTable | None:
    """Return the record of a table, which the files hold under one of ``names``; ``None`` if they hold it elsewhere."""
    name, spec = names[0], source.specs.get(names[0])
    if spec is not None:
        size = _packed_bytes(name, spec, shape)
        return ModelTable(
            name=name,
            role=role,
            shape=shape,
            num_bits=spec.num_bits,
            grid=spec.label(),
            bits_per_weight=spec.bits_per_weight(shape[1]),
            num_bytes=size,
            weight_error=errors.get(name),
        )
    stored = next((f"{each}.weight" for each in names if f"{each}.weight" in source.float_names()), None)
    if stored is None:
        return None
    tensor = source.tensor(stored)
    rows = QuantSpec(num_bits=8, group_size=-1, scale_dtype=next(iter(source.specs.values())).scale_dtype)
    small = _packed_bytes(name, rows, shape) if can_be_packed else None
    return ModelTable(
        name=name,
        role=role,
        shape=shape,
        grid=dtype_name(tensor.dtype),
        bits_per_weight=8 * tensor.itemsize,
        num_bytes=tensor.nbytes,
        int8_bytes=small,
    )


def _packed_bytes(name: str, spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Return the bytes in files of a packed weight ``[out, in]``."""
    return sum(tensor.nbytes for tensor in packed_parts(name, spec, shape).values())


def weight_errors(loaded: LoadedModel, config: ModelConfig) -> dict[str, float]:
    """Return ``relative_error`` of each packed linear of ``loaded`` against the weights in the float model's files.

    For methods that train the whole model. The float weights are mapped, and the pages of each are freed after use, so
    one weight is in memory at a time.
    """
    dtype = dtype_name(loaded.storage_dtype)  # the dtype of the files, so that nothing is copied
    floats = load_model(config.model_copy(update={"dtype": dtype, "device": "cpu"}), checked=loaded)
    return errors_against(loaded.model, floats.model)


def errors_against(model: nn.Module, floats: nn.Module) -> dict[str, float]:
    """Return ``relative_error`` of each packed linear of ``model`` against the weight of that name in ``floats``."""
    pages, errors = memory.Pages(), {}
    for name, layer in packed_weights(model).items():
        weight = stored_weight(floats.get_submodule(name))
        codes, scale, zero_point, spec = layer.quantized
        errors[name] = relative_error(weight, QuantizedWeight(codes.cpu(), scale.cpu(), zero_point.cpu(), spec))
        pages.drop(weight)
    return errors
