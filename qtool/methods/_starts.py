"""The codes from which the training of a block starts, found without training."""

from typing import Literal

from qtool.blocks.stages import stages
from qtool.blocks.task import BlockTask
from qtool.methods import gptq, rtn
from qtool.methods.rtn import round_to_nearest
from qtool.quant.affine import QuantizedWeight, on_grid
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.ranges import search_qparams

Init = Literal["minmax", "search", "gptq"]
PLAIN = rtn.Config()  # rounding to nearest in the range of each group's extremes
SEARCH_NORM = 3.0  # exponent of the error that the range search lowers, as in gptq and signround


def starting_points(task: BlockTask, init: Init) -> dict[str, QuantizedWeight]:
    """Return grid and codes of each linear by name, and compute the float outputs while the block is unchanged.

    minmax: nearest codes between the extremes of each group; search: nearest codes in the range with the smallest error
    of the weights, each input channel weighted by its mean square; gptq: the codes of GPTQ with its defaults.
    """
    if init == "gptq":
        return _solved(task)
    importance = task.pass_floats([group[0].linear for group in task.groups] if init == "search" else [])
    if init == "minmax":
        return {target.name: round_to_nearest(target.weight, target.spec, PLAIN) for target in task.targets}
    found = {}
    for group in task.groups:
        for target in group:
            weight, spec = target.weight, target.spec
            grid = search_qparams(weight, spec, SEARCH_NORM, importance[group[0].linear])
            found[target.name] = on_grid(weight, grid, spec)
    return found


def _solved(task: BlockTask) -> dict[str, QuantizedWeight]:
    """Quantize the block by GPTQ with its defaults, and return the result; this sets the float outputs as well."""
    solver, found = gptq.Config(), {}
    for stage in stages(task):
        gptq.quantize_stage(task, stage, solver)
        for target in stage.targets:
            layer = task.block.get_submodule(task.local_name(target))
            assert isinstance(layer, PackedLinear)
            found[target.name] = layer.quantized
    task.outputs = None  # these were made by GPTQ's codes, which training changes
    return found
