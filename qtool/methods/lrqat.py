"""LR-QAT: train a low-rank term inside the rounding, on weights that stay frozen on a grid of few bits.

Full quantization-aware training holds for every weight a master copy, a gradient and two moments. LR-QAT (arXiv
2406.06385) trains, for each linear, only two thin factors and the scales:

    W = scale * (clip(round(Phi + alpha / r * A B)) - zero_point),      A [out, r], B [r, in]

``Phi = phi(W0 / scale0 + zero_point)`` is where the float weight lies on the grid at the start, kept in few bits (eqs.
6 to 8): ``fixed``, one byte with ``8 - num_bits`` bits behind the point; ``codes``, the rounded weight; or bfloat16
and float32. Since the product is inside the rounding, training ends with one matrix of integers: no adapter is left
beside it, and the integers are those of the last forward, bit for bit. With ``checkpoint_weights`` nothing of the size
of a weight lives from the forward to the backward.

Where we differ: Phi counts from the grid's middle, so that asymmetric grids fit the same byte, which the released code
cannot run at 2 bits; ``factors: svd`` fits what Phi lost in grid units, which is exact for every kind of group;
``factors: inputs``, the default, lets B start along the directions in which the linear's inputs are largest, where a
change of the weight does most, instead of at random (the first steps move A alone, by ``G B^T``, so B says what they
can do); and the rates follow the budget: an entry of A or B whose gradient never changes its sign moves by ``travel``
in the whole training, the ends of a range by ``scale_travel`` quantization steps. ``lr`` and ``scale_lr`` take the
paper's rates.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.blocks.driver import group_inputs, walk
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.stages import Stage
from qtool.config.quant import QuantSpec
from qtool.config.training import EndToEnd, OptimConfig
from qtool.methods import gptq
from qtool.models.linears import Target, linear_bias
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.packing import pack, unpack
from qtool.quant.ranges import search_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.training.fit import ParamGroup
from qtool.training.linears import train_linears

OBSERVED = 2**14  # tokens that say where inputs are large
OVERSAMPLING, POWER_ITERATIONS = 8, 4  # of subspace iteration: directions more than are asked for, and products
B_ROW_RMS = 4.6  # of the rows of B along the inputs
MIN_ENERGY = 1e-8  # of what the first direction carries: a row of zeros could not learn while A has none but zeros
Form = Literal["fixed", "codes", "bfloat16", "float32"]


class Config(EndToEnd):
    """LR-QAT: a low-rank term inside the rounding, trained end to end on frozen weights of few bits."""

    name: Literal["lrqat"] = "lrqat"
    rank: int = Field(32, ge=1, description="Columns of A and rows of B.")
    alpha: float = Field(1.0, gt=0, description="The product A B counts alpha / rank times, in codes.")
    phi: Form = Field(
        "fixed",
        description="How the frozen weight is held: one byte with 8 - num_bits bits behind the point, rounded codes, "
        "or a float.",
    )
    factors: Literal["inputs", "zero", "svd"] = Field(
        "inputs",
        description="Start of A and B: A zero and B along the main directions of the inputs, A zero and B random, or "
        "the best fit of what phi lost.",
    )
    svd_steps: int = Field(1, ge=1, description="Rounds of splitting a weight into phi and factors, for svd.")
    range: Literal["minmax", "search"] = Field(
        "search", description="Ranges at the start: the extremes, or the least error of weights."
    )
    norm: float = Field(3.0, gt=0, description="Exponent of the error that the range search lowers.")
    travel: float = Field(1.0, ge=0, description="How far an entry of A or B can move in all steps.")
    scale_travel: float = Field(
        0.15, ge=0, description="How far the ends of a range can move in all steps, in quantization steps."
    )
    lr: float | None = Field(None, ge=0, description="Learning rate of A and B, in place of travel.")
    scale_lr: float | None = Field(None, ge=0, description="Learning rate of scales, in place of scale_travel.")
    checkpoint_weights: bool = Field(
        True, description="Expand each weight again for its gradient instead of holding it; same result."
    )
    optim: OptimConfig = Field(
        OptimConfig(betas=(0.9, 0.95), schedule="linear", final_share=0.0, warmup_share=0.1, max_grad_norm=1.0),
        description="How parameters follow their gradients.",
    )


class Phi(nn.Module):
    """Grid positions ``[out, in]`` kept in a form of few bits, counted from the grid's middle."""

    kept: Tensor

    def __init__(self, grid: Tensor, spec: QuantSpec, form: Form) -> None:
        """Keep ``grid`` ``[out, in]``, in codes; ``fixed`` and ``codes`` clip it to the grid, the others do not."""
        super().__init__()
        self.form, self.spec, self.num_columns = form, spec, grid.shape[1]
        self.steps = 2.0 ** (8 - spec.num_bits)  # of fixed, in one code
        self.register_buffer("kept", self._keep(grid.float()))

    def _keep(self, grid: Tensor) -> Tensor:
        centred = grid - self.spec.middle
        match self.form:
            case "fixed":
                inside = centred.clamp(self.spec.qmin - self.spec.middle, self.spec.qmax - self.spec.middle)
                return (inside * self.steps).round().to(torch.int8)
            case "codes":
                return pack(grid.round().clamp(self.spec.qmin, self.spec.qmax).to(torch.uint8), self.spec.num_bits)
            case _:
                return centred.to(getattr(torch, self.form))

    def forward(self) -> Tensor:
        """The positions as float32 ``[out, in]``."""
        match self.form:
            case "fixed":
                return self.kept.float() / self.steps + self.spec.middle
            case "codes":
                return unpack(self.kept, self.spec.num_bits, self.num_columns).float()
            case _:
                return self.kept.float() + self.spec.middle


class LowRankLinear(QuantLinear):
    """A linear whose frozen weight has a low-rank term added inside the rounding; A, B and the scales train."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        config: Config,
        generator: torch.Generator,
        directions: Tensor | None = None,
    ) -> None:
        """Put ``weight`` ``[out, in]`` on its grid; B is ``directions`` ``[r, in]``, or random from ``generator``."""
        super().__init__(weight, bias, spec, config.rounding)
        if config.range == "search":
            self.scale.data, self.zero_point.data = search_qparams(weight, spec, config.norm)
        self.zero_point.requires_grad_(False)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # Phi is all that is held of it
        self.config, self.factor = config, config.alpha / config.rank
        rows, columns = weight.shape
        rank = min(config.rank, rows, columns)
        self.a = nn.Parameter(weight.new_zeros(rows, rank, dtype=torch.float32))
        if directions is None:
            directions = torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
        self.b = nn.Parameter(directions[:rank].to(weight.device, torch.float32, copy=True))
        self._split(affine.to_grid(weight, self.scale, self.zero_point, spec).detach().flatten(1))

    @torch.no_grad()
    def _split(self, grid: Tensor) -> None:
        """Make Phi, and with ``svd`` the factors, of positions ``[out, in]``."""
        form, rank = self.config.phi, self.a.shape[1]
        self.phi = Phi(grid, self.spec, form)
        for _ in range(self.config.svd_steps if self.config.factors == "svd" else 0):
            self.phi = Phi(torch.addmm(grid, self.a, self.b, alpha=-self.factor), self.spec, form)
            u, s, v = torch.linalg.svd((grid - self.phi()) / self.factor, full_matrices=False)
            root = s[:rank].sqrt()
            self.a.copy_(u[:, :rank] * root)
            self.b.copy_(root.unsqueeze(1) * v[:rank])

    @torch.no_grad()
    def start_from(self, quantized: QuantizedWeight) -> None:
        """Start at exactly the codes of ``quantized``, on its grid, with nothing in the factors.

        Raises:
            InputError: another grid.
        """
        weight = affine.from_codes(affine.grouped(self.phi(), self.spec), self.scale, self.zero_point)
        moved = QuantLinear(weight, None, self.spec)
        moved.start_from(quantized)
        self.scale.copy_(moved.scale)
        self.zero_point.copy_(moved.zero_point)
        self.a.zero_()
        grid = affine.to_grid(moved.weight, self.scale, self.zero_point, self.spec).flatten(1)
        self.phi = Phi(grid, self.spec, self.config.phi)
        off = self.quantized.codes != quantized.codes  # where few bits round a position out of its cell
        self.phi = Phi(torch.where(off, quantized.codes.float(), self.phi()), self.spec, self.config.phi)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``Phi + alpha / r * A B`` in codes, ``[out, groups, group_size]``; the scale of now plays no part (eq. 5)."""
        with torch.autocast(self.a.device.type, enabled=False):  # or the integers would not be those that are packed
            return affine.grouped(torch.addmm(self.phi(), self.a, self.b, alpha=self.factor), self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the dtype of ``x``."""
        if self.config.checkpoint_weights and torch.is_grad_enabled():
            result: Tensor = checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)
            return result
        return super().forward(x)


def principal(gram: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The main directions ``[rank, in]`` of a sum of ``x^T x`` ``[in, in]``, the largest first, by subspace iteration.

    They are orthogonal. Their lengths grow with the fourth root of what each carries; the mean square is ``LENGTH**2``.
    """
    width = min(rank + OVERSAMPLING, len(gram))
    basis = torch.randn(len(gram), width, generator=generator).to(gram.device)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    carried, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
    least = carried.max() * MIN_ENERGY + torch.finfo(torch.float32).tiny
    lengths = carried.flip(0)[:rank].clamp(min=least) ** 0.25
    lengths *= B_ROW_RMS / lengths.square().mean().sqrt()
    directions: Tensor = (basis @ vectors).T.flip(0)[:rank] * lengths.unsqueeze(1)
    return directions


@torch.no_grad()
def input_directions(job: Job, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """For each linear the main directions ``[rank, in]`` of what it reads in the float model, of the first tokens."""
    found: dict[str, Tensor] = {}
    observed = job.text[: max(1, OBSERVED // job.text.shape[1])]
    for task in walk(replace(job, tokens=observed)):
        for group, inputs in group_inputs(task):
            gram = gptq.collect(Stage(group, inputs, None), gptq.Config()).hessian
            found |= dict.fromkeys([target.name for target in group], principal(gram, rank, generator))
    return found


def groups_of(layer: LowRankLinear, config: Config, total: float) -> list[ParamGroup]:
    """What trains of a layer; ``total`` is the sum of the schedule's factors."""
    scale = float(layer.scale.detach().mean())
    lr = config.travel / total if config.lr is None else config.lr
    ends = config.scale_travel * scale * 2 / layer.spec.qmax / total
    scale_lr = ends if config.scale_lr is None else config.scale_lr
    return [ParamGroup([layer.a, layer.b], lr), ParamGroup([layer.scale], scale_lr)]


def run(job: Job, config: Config) -> Result:
    """Train on the text of the job, absorb the factors and pack; the job's seed fixes B and the order of windows."""
    generator = torch.Generator().manual_seed(job.seed)
    directions: dict[str, Tensor] = {}
    if config.factors == "inputs":
        directions = input_directions(job, config.rank, generator)

    def make(target: Target, config: Config) -> LowRankLinear:
        bias = linear_bias(target.linear)
        return LowRankLinear(target.weight, bias, target.spec, config, generator, directions.pop(target.name, None))

    return train_linears(job, config, make, groups_of)


METHOD = Method(
    "lrqat",
    "a low-rank term inside the rounding, trained end to end",
    Config,
    run,
    end_to_end=lambda config: True,
)
