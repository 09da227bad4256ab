"""A native checkpoint that is made from a model's files alone, file by file; no class of the model is needed.

Its tensors have the names of the model's files. The key ``model_free`` of its ``quantization_config`` has the linears
that hold the experts of a layer, with their numbers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoints import side_files, written_config
from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import NativeCheckpoint, worst_scales
from qtool.checkpoints.quantization_config import FREE, section_of
from qtool.checkpoints.sizes import packed_parts
from qtool.config.quant import QuantSpec
from qtool.models.folders import read_config
from qtool.models.quantized_sources import FloatTensors, float_config
from qtool.models.shard_writer import Described, ShardWriter
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.packed_weight import PARTS

WEIGHT = f".{PARTS[0]}"


class PlannedFiles(NativeCheckpoint):
    """The checkpoint that a run is going to make of a model's files, for the checks of exporters."""

    def __init__(
        self,
        folder: Path,
        source: FloatTensors,
        specs: dict[str, QuantSpec],
        shapes: Mapping[str, tuple[int, int]],
        extremes: Mapping[str, float],
    ) -> None:
        """Describe the checkpoint whose config is in ``folder``; ``extremes`` are the largest values of tensors."""
        self.folder, self.specs = folder, specs
        self.config = read_config(folder)
        self._source, self._extremes = source, extremes
        self._tensors = {f"{name}.weight_shape": torch.tensor(shape) for name, shape in shapes.items()}
        self._tensors |= worst_scales(specs)

    def largest(self, name: str) -> float:
        """Return the largest absolute value of a tensor, or of the float weight of a linear."""
        return self._extremes.get(f"{name}{WEIGHT}" if name in self.specs else name, 0.0)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor that is known before the run."""
        return self._tensors[name] if name in self._tensors else self._source.tensor(name)

    def float_names(self) -> list[str]:
        """Return the names of the tensors that stay in floating point."""
        return [name for name in self._source.described if name.removesuffix(WEIGHT) not in self.specs]


def describe(
    folder: Path, source: FloatTensors, specs: dict[str, QuantSpec], experts: Mapping[str, int], dtype: str
) -> None:
    """Write what the checkpoint has beside its weights; ``dtype`` is that of most of the model's tensors.

    ``experts`` are the linears that hold several, with their numbers.

    Raises:
        InputError: a file of the model is no regular file, or is a link that leads elsewhere.
    """
    config = {key: value for key, value in float_config(read_config(source.folder)).items() if key != "auto_map"}
    config = written_config.written(config, None, dtype, None)
    write_json(
        folder / "config.json", config | {"quantization_config": section_of(specs) | {FREE: {"experts": experts}}}
    )
    side_files.copy(source.folder, folder)


def write_file(
    file: Path,
    source: FloatTensors,
    names: list[str],
    specs: Mapping[str, QuantSpec],
    shapes: Mapping[str, tuple[int, int]],
    quantize: Callable[[str, Tensor], QuantizedWeight],
) -> None:
    """Write the tensors ``names``, one in memory at a time; the weights of linears in ``specs`` are packed.

    ``quantize`` gets the name of a linear and its tensor as it is stored; ``shapes`` are ``(out, in)`` of its weight.

    Raises:
        RunError: a tensor that was read back differs from what was written.
    """
    planned: dict[str, Described] = {}
    for name in names:
        described = source.described[name]
        if (linear := name.removesuffix(WEIGHT)) in specs:
            parts = packed_parts(linear, specs[linear], shapes[linear])
            planned |= {part: Described(each.dtype, tuple(each.shape)) for part, each in parts.items()}
        else:
            planned[name] = described
    with ShardWriter(file, planned) as writer:

        def write(name: str, tensor: Tensor) -> None:
            if (linear := name.removesuffix(WEIGHT)) not in specs:
                writer.write(name, tensor)
                return
            layer = PackedLinear.from_quantized(quantize(linear, tensor), None)
            for part, stored in layer.state_dict().items():
                writer.write(f"{linear}.{part}", stored)

        for name in names:
            source.visit(name, partial(write, name))
