"""LR-QAT: train a low-rank term inside the rounding, on frozen weights that are kept in few bits.

Full quantization-aware training keeps a master copy, a gradient and two moments for every weight. LR-QAT (arXiv
2406.06385) trains, for each linear, only two thin factors and the scales:

    W = scale * (clip(round(Phi + alpha / r * A B)) - zero_point),      A [out, r], B [r, in]

``Phi = phi(W0 / scale0 + zero_point)`` is the position of the float weight on the grid of the start, kept in few bits
(eqs. 6 to 8): ``fixed``, one byte with ``8 - num_bits`` bits behind the point; ``codes``, the rounded weight; or
bfloat16 and float32. Since the product is inside the rounding, training ends with one matrix of integers: no adapter is
left beside it, and the integers are those of the last forward, bit for bit. With ``checkpoint_weights`` no tensor of
the size of a weight is kept from the forward to the backward pass.

Where we differ: Phi counts from the grid's middle, so that asymmetric grids fit the same byte, which the released code
cannot run at 2 bits; ``factors: svd`` fits the error of Phi in grid units, which is exact for every kind of group;
``factors: inputs``, the default, starts B along the directions in which the linear's inputs are largest, where a
change of the weight has most effect, instead of at random (the first steps move A alone, by ``G B^T``, so B limits the
changes that they can make); and learning rates follow from the number of steps: an entry of A or B whose gradient never
changes its sign moves by ``travel`` in the whole training, the ends of a range by ``scale_travel`` quantization steps.
``lr`` and ``scale_lr`` take the paper's learning rates.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.blocks.driver import group_inputs, walk
from qtool.blocks.job import Job, Method, Result
from qtool.config.quant import QuantSpec
from qtool.config.training import OF_DEPTH, EndToEnd, OptimConfig
from qtool.models.experts import num_experts
from qtool.models.linears import Target, linear_bias
from qtool.quant import affine
from qtool.quant.affine import QuantizedWeight
from qtool.quant.expert_product import block_product
from qtool.quant.hessian import gram
from qtool.quant.packing import pack, unpack
from qtool.quant.ranges import search_qparams
from qtool.quant.trained_linear import QuantLinear
from qtool.training.fit import ParamGroup
from qtool.training.linears import train_linears
from qtool.training.rates import ends_to_scale, of_depth, rate, scale_group

OBSERVED = 2**14  # number of tokens on which the main directions of inputs are measured
OVERSAMPLING, POWER_ITERATIONS = 8, 4  # subspace iteration: extra directions, and multiplications by the matrix
B_ROW_RMS = 4.6  # root mean square of the lengths of the rows of B that lie along the inputs
MIN_ENERGY = 1e-8  # relative floor of a direction's energy: a zero row of B gives A no gradient, and A starts at zero
Form = Literal["fixed", "codes", "bfloat16", "float32"]


class Config(EndToEnd):
    """LR-QAT: a low-rank term inside the rounding, trained end to end on frozen weights of few bits."""

    name: Literal["lrqat"] = "lrqat"
    rank: int = Field(
        32, ge=1, description="Rank of the low-rank term A B; at most the smaller side of the linear's weight."
    )
    alpha: float = Field(
        1.0, gt=0, description="Factor of the low-rank term: alpha / rank times A B is added to the weight, in codes."
    )
    phi: Form = Field(
        "fixed",
        description="Form of the frozen weight in memory. fixed: 8-bit fixed point with 8 - num_bits fractional bits; "
        "codes: rounded to num_bits bits; bfloat16, float32: a float.",
    )
    factors: Literal["inputs", "zero", "svd"] = Field(
        "inputs",
        description="Start of A and B. inputs: A zero, B along the main directions of the linear's inputs; zero: A "
        "zero, B random; svd: the best fit of the rounding error of phi.",
    )
    svd_steps: int = Field(
        1, ge=1, description="For factors: svd: number of alternating refinements of phi and the low-rank term."
    )
    range: Literal["minmax", "search"] = Field(
        "search",
        description="Range of each group at the start. minmax: its extremes; search: the range with the smallest error "
        "of its weights.",
    )
    norm: float = Field(3.0, gt=0, description="Exponent of the weight error that the range search lowers.")
    travel: float = Field(
        1.0,
        ge=0,
        description="Distance that an entry of A or B can move over all steps, in its own unit, whatever the depth of "
        "the model; sets their learning rate.",
    )
    scale_travel: float = Field(
        0.15,
        ge=0,
        description="Distance that the ends of a range can move over all steps, in quantization steps; sets the "
        "learning rate of scales. " + OF_DEPTH,
    )
    lr: float | None = Field(
        None, ge=0, description="Learning rate of A and B, in place of travel; unset: travel decides."
    )
    scale_lr: float | None = Field(
        None, ge=0, description="Learning rate of scales, in place of scale_travel; unset: scale_travel decides."
    )
    checkpoint_weights: bool = Field(
        True,
        description="Compute each rounded weight again in the backward pass instead of keeping it: less memory, same "
        "result.",
    )
    optim: OptimConfig = Field(
        OptimConfig(betas=(0.9, 0.95), schedule="linear", final_share=0.0, warmup_share=0.1, max_grad_norm=1.0),
        description="Optimizer and learning rate schedule.",
    )


class Phi(nn.Module):
    """Grid positions ``[out, in]`` kept in a form of few bits, counted from the grid's middle."""

    kept: Tensor

    def __init__(self, grid: Tensor, spec: QuantSpec, form: Form) -> None:
        """Keep positions ``grid`` ``[out, in]``, in codes; ``fixed`` and ``codes`` clip them to the grid."""
        super().__init__()
        self.form, self.spec, self.num_columns = form, spec, grid.shape[1]
        self.steps = 2.0 ** (8 - spec.num_bits)  # number of steps of the form fixed in one code
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
        """Return the positions as float32 ``[out, in]``."""
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
        experts: int = 1,
    ) -> None:
        """Put ``weight`` ``[out, in]`` on its grid; B is ``directions`` ``[r, in]``, or random from ``generator``.

        Each of the ``experts`` whose weights are stacked has an A and a B of its own; they start at the same B.
        """
        super().__init__(weight, bias, spec, config.rounding)
        if config.range == "search":
            self.scale.data, self.zero_point.data = search_qparams(weight, spec, config.norm)
        self.zero_point.requires_grad_(False)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # only Phi is kept
        self.config, self.factor = config, config.alpha / config.rank
        rows, columns = weight.shape
        self.experts = experts
        rank = min(config.rank, rows // experts, columns)
        self.a = nn.Parameter(weight.new_zeros(rows, rank, dtype=torch.float32))
        if directions is None:
            directions = torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
        self.b = nn.Parameter(directions[:rank].to(weight.device, torch.float32, copy=True).repeat(experts, 1))
        self._split(affine.to_grid(weight, self.scale, self.zero_point, spec).detach().flatten(1))

    @torch.no_grad()
    def _split(self, grid: Tensor) -> None:
        """Make Phi, and with ``svd`` the factors, from positions ``[out, in]``."""
        form, rank = self.config.phi, self.a.shape[1]
        self.phi = Phi(grid, self.spec, form)
        for _ in range(self.config.svd_steps if self.config.factors == "svd" else 0):
            self.phi = Phi(self._plus_term(grid, -self.factor), self.spec, form)
            error = ((grid - self.phi()) / self.factor).unflatten(0, (self.experts, -1))
            u, s, v = torch.linalg.svd(error, full_matrices=False)  # one decomposition for each expert
            root = s[:, :rank].sqrt()
            self.a.copy_((u[:, :, :rank] * root.unsqueeze(1)).flatten(0, 1))
            self.b.copy_((root.unsqueeze(2) * v[:, :rank]).flatten(0, 1))

    def _plus_term(self, grid: Tensor, factor: float) -> Tensor:
        """Return ``grid + factor * A B`` ``[out, in]``."""
        if self.experts == 1:
            return torch.addmm(grid, self.a, self.b, alpha=factor)
        return grid + factor * block_product(self.a, self.b, self.experts)

    @torch.no_grad()
    def start_from(self, quantized: QuantizedWeight, margin: float = 0.0) -> None:
        """Start at exactly the codes of ``quantized``, on its grid, with a low-rank term of zero.

        ``margin`` is the least distance of a weight from the edges of its code's cell, in codes.

        Raises:
            InputError: ``quantized`` has another grid.
        """
        weight = affine.from_codes(affine.grouped(self.phi(), self.spec), self.scale, self.zero_point, self.spec)
        moved = QuantLinear(weight, None, self.spec)
        moved.start_from(quantized, margin)
        self.scale.copy_(moved.scale)
        self.zero_point.copy_(moved.zero_point)
        self.a.zero_()
        grid = affine.to_grid(moved.weight, self.scale, self.zero_point, self.spec).flatten(1)
        self.phi = Phi(grid, self.spec, self.config.phi)
        codes, place = quantized.codes.float(), self.phi()
        # True where the form of Phi rounds a position to the edge of its code's cell or beyond
        off = (place.clamp(self.spec.qmin, self.spec.qmax) - codes).abs() >= 0.5
        self.phi = Phi(torch.where(off, codes, place), self.spec, self.config.phi)

    def grid_weight(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``Phi + alpha / r * A B`` in codes, ``[out, groups, group_size]``; it ignores the scale (eq. 5)."""
        with torch.autocast(self.a.device.type, enabled=False):  # autocast would give other integers than packing does
            return affine.grouped(self._plus_term(self.phi(), self.factor), self.spec)

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        if self.config.checkpoint_weights and torch.is_grad_enabled():
            result: Tensor = checkpoint(super().forward, x, counts, use_reentrant=False, preserve_rng_state=False)
            return result
        return super().forward(x, counts)


def principal(products: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return the main directions ``[rank, in]`` of a sum of ``x^T x`` ``[in, in]``, the largest first.

    They are found by subspace iteration, and are orthogonal. The length of each grows with the fourth root of its
    energy (eigenvalue); the root mean square of the lengths is ``B_ROW_RMS``.
    """
    width = min(rank + OVERSAMPLING, len(products))
    basis = torch.randn(len(products), width, generator=generator).to(products.device)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(products @ basis).Q
    carried, vectors = torch.linalg.eigh(basis.T @ products @ basis)
    least = carried.max() * MIN_ENERGY + torch.finfo(torch.float32).tiny
    lengths = carried.flip(0)[:rank].clamp(min=least) ** 0.25
    lengths *= B_ROW_RMS / lengths.square().mean().sqrt()
    directions: Tensor = (basis @ vectors).T.flip(0)[:rank] * lengths.unsqueeze(1)
    return directions


@torch.no_grad()
def input_directions(job: Job, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the main directions ``[rank, in]`` of each linear's inputs in the float model, on the first tokens."""
    found: dict[str, Tensor] = {}
    for task in walk(job.first(max(1, OBSERVED // job.text.shape[1]))):
        for group, inputs in group_inputs(task):
            directions = principal(gram(rows.x for rows in inputs), rank, generator)
            found |= dict.fromkeys([target.name for target in group], directions)
    return found


def groups_of(layer: LowRankLinear, config: Config, total: float, num_blocks: int = 1) -> list[ParamGroup]:
    """Return the parameters of a layer that train, with learning rates; distances are divided by ``total``.

    It grows with the ``num_blocks`` that train at once (``rates.end_to_end_total``); A and B move as far in all models.
    """
    return [
        ParamGroup([layer.a, layer.b], rate(config.travel, of_depth(total, num_blocks), config.lr)),
        scale_group(layer.scale, ends_to_scale(config.scale_travel, layer.spec.qmax), total, config.scale_lr),
    ]


def run(job: Job, config: Config) -> Result:
    """Train on the text of the job and pack; the seed determines a random B and the order of windows."""
    generator = torch.Generator().manual_seed(job.seed)
    directions: dict[str, Tensor] = {}
    if config.factors == "inputs":
        directions = input_directions(job, config.rank, generator)

    def make(target: Target, config: Config) -> LowRankLinear:
        bias = linear_bias(target.linear)
        found, experts = directions.pop(target.name, None), num_experts(target.linear)
        return LowRankLinear(target.weight, bias, target.spec, config, generator, found, experts)

    return train_linears(job, config, make, partial(groups_of, num_blocks=len(job.loaded.blocks())))


METHOD = Method(
    "lrqat",
    "a low-rank term inside the rounding, trained end to end",
    Config,
    run,
    end_to_end=lambda config: True,
)
