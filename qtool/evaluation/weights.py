"""The linears of a report: their names, shapes and grids, and the error of each quantized weight."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from qtool.config.quant import QuantSpec
from qtool.config.sections import ModelConfig
from qtool.models.kept_float import other_matrices
from qtool.models.linears import packed_weights, stored_weight
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_linear import PackedLinear
from qtool.reports.records import Linear
from qtool.system import memory
from qtool.system.tensors import dtype_name


def block_linears(loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    """Return the shape ``(out, in)`` of every linear in the decoder blocks by full name, then of other matrices."""
    found = {}
    for block_name, block in loaded.blocks():
        for name, module in block.named_modules():
            if isinstance(module, PackedLinear):
                found[f"{block_name}.{name}"] = (module.out_features, module.in_features)
            elif isinstance(module, nn.Linear | Conv1D):
                rows, columns = stored_weight(module).shape
                found[f"{block_name}.{name}"] = (rows, columns)
    matrices = other_matrices(loaded.blocks())
    return found | {name: (p.numel() // p.shape[-1], p.shape[-1]) for name, p in matrices.items()}


def linear_records(
    shapes: dict[str, tuple[int, int]], specs: dict[str, QuantSpec], errors: dict[str, float]
) -> tuple[Linear, ...]:
    """Return the records of the linears ``shapes``; a linear without a grid in ``specs`` stays in floating point."""
    return tuple(
        Linear(name=name, shape=shape)
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
