"""SmoothQuant: move outliers of activations into the weights, so that the rounding of activations loses less.

A few input channels of a decoder block are a hundred times as large as the others, and the grid of a token then leaves
few codes for those. For a scale ``s`` per input channel, ``W x = (W diag(s)) (x / s)``; the division is folded into the
module that makes ``x`` (``blocks/folds.py``), and the scaled weights are quantized (Xiao et al., arXiv 2211.10438).
With the migration strength ``a`` and the largest absolute values over the calibration text and over all linears that
read ``x``::

    s_j = max|x_j|**a / max|W_j|**min(a, 1 - a)

From 0.5 on this is the paper's equation 4: at 0.5 channel ``j`` has the same largest value in activations and weights,
at 1 all input channels have the largest value 1. Below 0.5 both exponents shrink together, so that strength 0 gives
``s = 1`` and changes nothing, where the paper's formula would equalise the columns of the weights. A channel that is
always zero, in the text or in the weights, keeps its scale of 1.

Where we differ: the paper scales behind norms only; we also use the linears that can take a scale exactly (v before o,
up before down). The maxima are those of inputs that come from the quantized blocks before, in floating point, before
activations are rounded. What is folded into a norm is what its stored dtype can hold.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qtool.blocks.driver import run_blocks
from qtool.blocks.folds import Fold, Found, folds_of
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.shares import by_rows
from qtool.blocks.stages import stages
from qtool.blocks.task import BlockTask
from qtool.config.sections import MethodConfig
from qtool.methods import gptq, rtn
from qtool.models.linears import Target
from qtool.quant.affine import check_weight
from qtool.system import distributed, progress


class Config(MethodConfig):
    """SmoothQuant, then round to nearest or GPTQ."""

    name: Literal["smoothquant"] = "smoothquant"
    strength: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of an outlier that moves from activations into weights. 0: nothing is scaled; 0.5: "
        "activations and weights of a channel become equally large; 1: all channels of activations do.",
    )
    weights: Literal["rtn", "gptq"] = Field(
        "rtn", description="Method that quantizes the scaled weights, with its defaults but for range."
    )
    range: Literal["minmax", "search", "weighted"] | None = Field(
        None,
        description="Range of each group, as the method in weights has it; weighted needs weights: gptq; unset: that "
        "method's default.",
    )

    @model_validator(mode="after")
    def _range_fits(self) -> "Config":
        if self.range == "weighted" and self.weights == "rtn":
            raise ValueError("range: weighted needs weights: gptq; rtn has minmax and search")
        return self


def smoothing_scale(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Return ``s`` ``[channels]`` float32 for the largest absolute inputs and weights ``[channels]`` of each channel.

    From strength 0.5 on, a factor between inputs and weights changes ``s`` by itself, exactly so for powers of two: it
    is computed as ``x (x w)**(strength - 1)``.
    """
    x, w = inputs.double(), weights.double()
    s = x * (x * w).pow(strength - 1) if strength >= 0.5 else (x / w).pow(strength)
    return torch.where((x > 0) & (w > 0), s, 1.0).float()


def largest_inputs(task: BlockTask, linears: Iterable[nn.Module]) -> dict[nn.Module, Tensor]:
    """Return the largest absolute value ``[in]`` of each channel that each of ``linears`` reads of the whole text."""
    largest: dict[nn.Module, Tensor] = {}

    def visit(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        low, high = args[0].flatten(0, -2).float().aminmax(dim=0)
        found = torch.maximum(-low, high)
        largest[linear] = torch.maximum(largest[linear], found) if linear in largest else found

    linears = list(linears)
    for hidden in task.inputs:
        task.observe(linears, visit, [hidden])
    for linear in linears:
        distributed.all_reduce_max(largest[linear])
    return largest


def largest_weights(readers: Iterable[Target]) -> Tensor:
    """Return the largest absolute weight ``[in]`` of each input channel over all ``readers``."""
    found = []
    for reader in readers:
        low, high = reader.weight.aminmax(dim=0)
        found.append(torch.maximum(-low, high))
    return torch.stack(found).amax(0)


def smooth(task: BlockTask, strength: float, storage: torch.dtype, found: Found) -> None:
    """Scale the float weights of a block; its output stays the same but for float rounding.

    Raises:
        InputError: the scale of a scaled weight is above the largest number of its stored dtype.
    """
    kinds = len(found)
    folds = folds_of(task, task.inputs[0][:1], found)
    if len(found) > kinds:
        _note_others(task, folds)
    if not folds:
        return
    # a fold changes the inputs of its own readers only, so that one pass over the text serves all
    inputs = largest_inputs(task, [fold.readers[0].linear for fold in folds])
    for fold in reversed(folds):  # a linear gets the scale of its rows, as a source, before its columns are measured
        s = smoothing_scale(inputs[fold.readers[0].linear], largest_weights(fold.readers), strength)
        fold.apply(s, storage)
    for target in task.targets:
        check_weight(target.weight, target.spec, f"{target.name}.weight, scaled by method.strength {strength:g},")


def _note_others(task: BlockTask, folds: list[Fold]) -> None:
    """Say which linears of a new kind of block round their inputs, and no fold scales."""
    scaled = {reader.name for fold in folds for reader in fold.readers}
    rounding = [target.name for target in task.targets if target.spec.activations is not None]
    others = [name for name in rounding if name not in scaled]
    if others:
        progress.note(
            f"the inputs of {', '.join(others)}, and of linears like these in other blocks, are not scaled: no module "
            "before them can take a scale"
        )


def quantize_block(task: BlockTask, config: Config, storage: torch.dtype, found: Found) -> None:
    """Scale the weights of a block, then quantize them."""
    if config.strength > 0:
        smooth(task, config.strength, storage, found)
    chosen = {} if config.range is None else {"range": config.range}
    if config.weights == "rtn":
        nearest = rtn.Config.model_validate(chosen)
        for target in task.targets:
            solve = partial(rtn.round_to_nearest, spec=target.spec, config=nearest)
            task.pack(target, by_rows(target.weight, target.spec, solve))
        return
    settings = gptq.Config.model_validate(chosen)
    for stage in stages(task):
        gptq.quantize_stage(task, stage, settings)


def run(job: Job, config: Config) -> Result:
    """Scale and quantize the blocks in order on the text of the job; the seed is not used."""
    if config.strength > 0 and all(target.spec.activations is None for target in job.targets):
        progress.note(
            "quant.activations is unset: outliers are moved into the weights, but no activations are rounded; set it, "
            "or method.strength: 0"
        )
    step = partial(quantize_block, config=config, storage=job.loaded.storage_dtype, found={})
    # float32: scaling a half-precision weight in place would round it
    return run_blocks(job, step, compute=torch.float32 if config.strength > 0 else None)


METHOD = Method("ptq", "outliers of activations scaled into weights, for W8A8", Config, run)
