"""GPTQ: quantize one input channel at a time, and correct the later channels for the error.

For a linear with inputs ``x`` the output error of a weight change ``d`` is ``d H d^T`` with ``H = 2/n sum x x^T``.
Rounding column ``i`` by ``e`` leaves an optimal correction of the later columns, ``-e U_i,i: / U_ii`` with ``U`` the
upper Cholesky factor of ``H^-1`` (Frantar et al., arXiv 2210.17323). Rows share ``H`` and do not affect each other, so
linears that read the same input (q, k, v; gate, up) are stacked and solved at once.

The blocks run in order on the hidden states of the quantized model, and so do the linears inside a block ("true
sequential"): each group reads inputs made by the quantized linears before it. Columns are taken in one of three orders:
as they lie; ``group`` (GPTQModel's group-aware order: groups by their largest ``diag H``, columns by ``diag H`` inside,
so that groups stay whole and no order is stored); or ``full`` (descending ``diag H``, which needs grids fixed
beforehand).

GPTAQ (arXiv 2504.02692) also steers towards the float model's outputs: it adds the term
``w_i P_i`` with ``P = a [(D U^T) strictly upper] U`` and ``D = 2/n sum (x_float - x) x^T``.

``guided`` weighs the tokens of ``H`` by gradients of the model's loss (``training/guided.py``).

Where we differ: tokens count alike in ``H`` and ``D``, whatever the size of their inputs (``token_weights``); a dead
channel (never active in calibration) keeps its weights and is rounded to nearest, where the reference zeroes them;
column blocks always end where groups end, so a group's grid is fitted on weights that carry every correction made so
far; one factorisation serves all linears of a group.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.blocks.driver import run_blocks
from qtool.blocks.job import Job, Method, Result
from qtool.blocks.moments import Statistics, TokenWeights, collect, moment, weighed
from qtool.blocks.shares import by_rows, gathered, no_rows, own_part, own_rows, parts_of, pooled, stacked
from qtool.blocks.stages import Stage, stages
from qtool.blocks.task import BlockTask, Rows
from qtool.config.guided import GuidedHessian
from qtool.config.quant import QuantSpec
from qtool.config.sections import MethodConfig
from qtool.models.experts import num_experts
from qtool.models.linears import Target
from qtool.quant.affine import QuantizedWeight, minmax_qparams, on_grid
from qtool.quant.hessian import column_order, grams, invert_lower, parts, reverse
from qtool.quant.ranges import search_qparams
from qtool.system import distributed, memory, progress
from qtool.system.errors import RunError
from qtool.training.guided import EndLoss, end_loss, weighted

DAMP_LADDER = (1, 2, 5, 10, 30, 100)  # multiples of damp, tried in turn until the Hessian can be factorised
HESSIANS_BYTES = 2**28  # memory of the Hessians of a layer's experts that are made together
ONE_BY_ONE = 16  # number of columns up to which each corrects the next; larger ranges are corrected by a product


class Config(MethodConfig):
    """GPTQ, with group-aware ordering."""

    name: Literal["gptq"] = "gptq"
    damp: float = Field(
        0.05, gt=0, description="Damping added to the Hessian's diagonal, as a share of the diagonal's mean."
    )
    act_order: Literal["off", "group", "full"] = Field(
        "group",
        description="Order in which columns are quantized. off: as they lie; group: by activation energy, groups kept "
        "whole; full: by activation energy alone, needs static_groups.",
    )
    static_groups: bool = Field(
        False,
        description="Fit the grids of all groups to the original weights, before the first column is quantized; false: "
        "fit each to the corrected weights when its first column is reached.",
    )
    range: Literal["minmax", "search", "weighted"] = Field(
        "weighted",
        description="Range of each group. minmax: its extremes; search: the range with the smallest error of its "
        "weights; weighted: the same, with the error of each column weighted by its effect on the output.",
    )
    norm: float = Field(3.0, gt=0, description="Exponent of the weight error that the range search lowers.")
    block_size: int = Field(
        128,
        ge=1,
        description="Largest number of columns per block: errors are propagated to later columns once per block. "
        "Affects speed and summation order only.",
    )
    gptaq: float = Field(
        0.0, ge=0, le=1, description="Strength of GPTAQ's correction towards the outputs of the float model; 0: off."
    )
    token_weights: TokenWeights = Field(
        "relative",
        description="Weight of a token in the Hessian. relative: an error counts relative to the size of the token's "
        "input; plain: tokens with larger inputs count more, as in the paper. With guided, its weights count "
        "instead; a head needs none.",
    )
    guided: GuidedHessian = Field(
        GuidedHessian(), description="End-loss weights of tokens in the Hessian of each linear; a head has none."
    )
    min_expert_tokens: int = Field(
        16,
        ge=0,
        description="Fewest calibration tokens that an expert of a mixture must see for error compensation; one that "
        "sees fewer is rounded to nearest in a searched range.",
    )

    @model_validator(mode="after")
    def _full_order_needs_static_groups(self) -> "Config":
        if self.act_order == "full" and not self.static_groups:
            raise ValueError("act_order: full needs static_groups: true, or groups would not be contiguous on disk")
        return self


class Factor(NamedTuple):
    """The order of the columns, and the correction of later columns for the error of each."""

    order: Tensor  # [in]
    upper: Tensor  # U [in, in]: upper Cholesky factor of the inverse of the damped, ordered Hessian
    drift: Tensor | None  # P [in, in], GPTAQ's correction


def factorise(statistics: Statistics, spec: QuantSpec, config: Config, name: str) -> Factor:
    """Order, damp, factorise and invert the Hessian, with more damping each time that the factorisation fails.

    With ``J`` the reversal and ``J H J = L L^T``, ``U = J L^-1 J`` is upper triangular and ``U^T U = H^-1``: one
    Cholesky factorisation and one triangular inverse, where inverting first takes two and a full inverse.

    Raises:
        RunError: The strongest damping does not help; the message names the linear.
    """
    diagonal = statistics.hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1.0
    order = column_order(diagonal, spec, config.act_order)
    diagonal = diagonal[order]
    mean = float(diagonal.mean())
    info = torch.empty(0, dtype=torch.int32, device=diagonal.device)
    backwards = order.flip(0)
    for step in DAMP_LADDER:
        # every operation works in place: this matrix is the largest tensor of a run
        upper = statistics.hessian[backwards.unsqueeze(1), backwards]
        upper.diagonal().copy_(diagonal.flip(0) + step * config.damp * mean)
        failed = torch.linalg.cholesky_ex(upper.T, upper=True, out=(upper.T, info)).info
        if not failed:
            invert_lower(upper)
            reverse(upper)
            if bool(torch.isfinite(upper.sum())):
                break
        progress.note(f"{name}: the Hessian is not positive definite with damping {step * config.damp:g}; trying more")
    else:
        raise RunError(
            f"{name}: the Hessian cannot be factorised even with damping {DAMP_LADDER[-1] * config.damp:g} "
            f"(mean diagonal {mean:.3g}); use more or other calibration text, or a larger method.damp"
        )
    if statistics.drift is None:
        return Factor(order, upper, None)
    drift = statistics.drift[order][:, order]
    return Factor(order, upper, config.gptaq * (drift @ upper.T).triu(1) @ upper)


def fit_grid(weight: Tensor, importance: Tensor, spec: QuantSpec, config: Config) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of whole groups of ``weight``; ``importance`` ``[in]`` is ``1 / U_jj**2``.

    The squared error of column ``j`` times ``1 / U_jj**2`` is the output error that all later corrections leave. An
    exponent above 2 was better at 2 bits and no worse at more bits: docs/benchmarks.md.
    """
    if config.range == "minmax":
        return minmax_qparams(weight, spec)
    return search_qparams(weight, spec, config.norm, importance if config.range == "weighted" else None)


class Work(NamedTuple):
    """A weight that is being quantized, transposed: one row for each input channel, in the order of rounding."""

    weight: Tensor  # [in, rows] float32: the channels done are rounded, the later ones corrected
    codes: Tensor  # [in, rows] uint8
    first: int  # index of the first channel of the current block
    errors: Tensor  # [block, rows] (w - Q(w)) / U_ii, for the correction of later channels
    before: Tensor | None  # [block, rows] the block's weights before rounding, for GPTAQ


def compensate(
    work: Work, grid: Callable[[int], tuple[Tensor, Tensor]], factor: Factor, start: int, stop: int, spec: QuantSpec
) -> None:
    """Round the channels ``start .. stop``; each corrects the channels after it in that range.

    The range is halved recursively, and a finished half corrects the other in one product. ``grid(i)`` returns the
    scale and zero point ``[rows]`` of channel ``i``.
    """
    weight, codes, first, errors, before = work
    if stop - start > ONE_BY_ONE:
        middle = (start + stop) // 2
        compensate(work, grid, factor, start, middle, spec)
        done, rest, here = slice(start, middle), slice(middle, stop), slice(start - first, middle - first)
        weight[rest].addmm_(factor.upper[done, rest].T, errors[here], alpha=-1)
        if factor.drift is not None and before is not None:
            weight[rest].addmm_(factor.drift[done, rest].T, before[here])
        compensate(work, grid, factor, middle, stop, spec)
        return
    for i in range(start, stop):
        scale, zero_point = grid(i)
        column = weight[i]
        code = (column / scale).add_(zero_point).round_().clamp_(spec.qmin, spec.qmax)  # affine.quantize, one column
        rounded = (code - zero_point).mul_(scale)
        error = torch.sub(column, rounded, out=errors[i - first]).div_(factor.upper[i, i])
        later = slice(i + 1, stop)
        weight[later].addr_(factor.upper[i, later], error, alpha=-1)
        if factor.drift is not None and before is not None:
            before[i - first] = column
            weight[later].addr_(factor.drift[i, later], column)
        codes[i], weight[i] = code, rounded


def solve(weight: Tensor, factor: Factor, spec: QuantSpec, config: Config) -> QuantizedWeight:
    """Quantize ``weight`` ``[out, in]`` column by column and return it on its grid."""
    rows, columns = weight.shape
    num_groups = spec.num_groups(columns)
    group_size = columns // num_groups
    group_of = (factor.order // group_size).tolist()  # group of each column, in the order of rounding
    together = spec.columns_together(columns)  # columns whose grids are fitted at the same time
    width = next(w for w in range(min(config.block_size, together), 0, -1) if together % w == 0)
    cost = factor.upper.diagonal().square().reciprocal()
    if config.static_groups:
        ends = fit_grid(weight, cost[torch.argsort(factor.order)], spec, config)
        scale, zero_point = (side.T.contiguous() for side in ends)
    else:
        scale, zero_point = weight.new_empty(num_groups, rows), weight.new_empty(num_groups, rows)
    fitted = spec if spec.blocks is not None else spec.model_copy(update={"group_size": -1})
    current = weight.T.index_select(0, factor.order)
    del weight
    codes = torch.empty_like(current, dtype=torch.uint8)
    errors = current.new_empty(width, rows)
    before = None if factor.drift is None else torch.empty_like(errors)
    for start in range(0, columns, width):
        done, rest = slice(start, start + width), slice(start + width, columns)
        if start % together == 0 and not config.static_groups:
            whole = slice(start, start + together)
            columns_now, cost_now = current[whole], cost[whole]
            if spec.blocks is not None:  # a block has several groups, whose columns must follow each other
                places = torch.argsort(factor.order[whole])
                columns_now, cost_now = columns_now[places], cost_now[places]
            first = int(factor.order[whole].min()) // group_size
            ends = fit_grid(columns_now.T.contiguous(), cost_now, fitted, config)
            for side, end in zip((scale, zero_point), ends, strict=True):
                side[first : first + end.shape[1]] = end.T
        work = Work(current, codes, start, errors, before)
        compensate(work, lambda i: (scale[group_of[i]], zero_point[group_of[i]]), factor, start, start + width, spec)
        current[rest].addmm_(factor.upper[done, rest].T, errors, alpha=-1)
        if factor.drift is not None:
            current[rest].addmm_(factor.drift[done, rest].T, current[done])
    restored = torch.empty_like(codes)
    restored[factor.order] = codes
    return QuantizedWeight(restored.T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), spec)


def _stacked(targets: list[Target]) -> Tensor:
    """Return the weights of linears that share an input as one matrix ``[sum of out, in]``."""
    return torch.cat([target.weight for target in targets]) if len(targets) > 1 else targets[0].weight


def quantize_group(task: BlockTask, group: list[Target], statistics: Statistics, config: Config) -> None:
    """Quantize linears that share an input; linears with equal grids are stacked and solved together."""
    memory.return_freed()  # the peak of a run's memory is here
    specs = list(dict.fromkeys(target.spec for target in group))
    for spec in specs:
        same = [target for target in group if target.spec == spec]
        factor = factorise(statistics, spec, config, same[0].name)
        if spec is specs[-1]:
            del statistics  # as large as the factor
        solving = partial(solve, factor=factor, spec=spec, config=config)
        codes, scale, zero_point, _ = by_rows(_stacked(same), spec, solving)
        del factor, solving
        memory.return_freed()
        sizes = [target.weight.shape[0] for target in same]
        for target, *rows in zip(same, codes.split(sizes), scale.split(sizes), zero_point.split(sizes), strict=True):
            task.pack(target, QuantizedWeight(rows[0], rows[1], rows[2], spec))


def solve_experts(
    target: Target, inputs: Iterable[Rows], specs: Sequence[QuantSpec], config: Config
) -> list[QuantizedWeight]:
    """Quantize the experts stacked in ``target`` on each of the grids ``specs``, and return them stacked again.

    The Hessian of an expert is that of its own ``n`` tokens, blended with that of all tokens, which counts for as many
    tokens as there are channels: ``H = a H_own + (1 - a) H_all`` with ``a = n / (n + in)``. Hessians are made of a few
    experts at a time; of several processes each gets the Hessians of some of these, and solves them. GPTAQ's correction
    is not used: the float model sends other tokens to an expert.
    """
    memory.return_freed()
    experts = num_experts(target.linear)
    rows = target.weight_shape[0] // experts
    shared = moment(inputs, config.token_weights)
    found: list[list[QuantizedWeight]] = [[] for _ in specs]
    few = []
    for group in parts(experts, max(distributed.place()[1], HESSIANS_BYTES // shared.nbytes)):
        own_parts = (batch.x.split(batch.counts or [])[group] for batch in inputs)
        hessians = pooled(grams([weighed(x, config.token_weights) for x in each] for each in own_parts))
        few += [group.start + i for i, (_, count) in enumerate(hessians) if count < config.min_expert_tokens]
        mine = own_part(len(hessians))
        solved = [[no_rows(shared, spec)] for spec in specs]
        for expert, (own, count) in enumerate(hessians[mine], start=group.start + mine.start):
            weight = target.stored_weight[expert * rows : (expert + 1) * rows].float().contiguous()
            share = count / (count + len(shared))
            statistics = Statistics(own.mul_(share).add_(shared, alpha=1 - share), None)
            for spec, each in zip(specs, solved, strict=True):
                each.append(_solve_expert(weight, count, statistics, spec, config, f"{target.name}, expert {expert}"))
            del own, statistics
        sizes = [rows * each for each in parts_of(len(hessians))]
        for whole, each in zip(found, solved, strict=True):
            whole.append(gathered(stacked(each), sizes))
        memory.return_freed()
    if few:
        progress.note(
            f"{target.name}: {len(few)} of {experts} experts (the first is {few[0]}) saw fewer than "
            f"{config.min_expert_tokens} calibration tokens and are rounded to nearest in a searched range; more "
            "calibration text reaches more experts"
        )
    return [stacked(each) for each in found]


def _solve_expert(
    weight: Tensor, count: int, statistics: Statistics, spec: QuantSpec, config: Config, name: str
) -> QuantizedWeight:
    """Quantize the weight of one expert, which saw ``count`` tokens."""
    if count < config.min_expert_tokens:
        return on_grid(weight, search_qparams(weight, spec, config.norm), spec)
    return solve(weight, factorise(statistics, spec, config, name), spec, config)


def quantize_guided(task: BlockTask, stage: Stage, config: Config, guide: EndLoss) -> None:
    """Quantize each linear of a stage, and each slice of its rows, with a Hessian of weighted tokens."""
    memory.return_freed()
    found: dict[Target, QuantizedWeight] = {}
    for target in stage.targets:
        weights = own_rows(guide.of_linear(target.name), task.inputs.share)
        slices = []
        for rows, column in zip(target.weight.tensor_split(weights.shape[1]), weights.unbind(1), strict=True):
            factor = factorise(collect(weighted(stage, column)), target.spec, config, target.name)
            solving = partial(solve, factor=factor, spec=target.spec, config=config)
            slices.append(by_rows(rows.contiguous(), target.spec, solving))
            del factor, solving
        found[target] = stacked(slices)
    for target, quantized in found.items():  # after the last, as a stage may be read by running the block again
        task.pack(target, quantized)


def quantize_stage(task: BlockTask, stage: Stage, config: Config, guide: EndLoss | None = None) -> None:
    """Quantize the linears of a stage, or the experts of a layer; ``guide`` weighs the tokens of a decoder block."""
    if guide is not None and not task.is_head:
        quantize_guided(task, stage, config, guide)
        return
    if num_experts(stage.targets[0].linear) == 1:
        token_weights = "plain" if task.is_head else config.token_weights
        quantize_group(task, stage.targets, collect(stage, token_weights), config)
        return
    for target in stage.targets:
        (solved,) = solve_experts(target, stage.inputs, [target.spec], config)
        task.pack(target, solved)


def run(job: Job, config: Config) -> Result:
    """Quantize the blocks in order on the text of the job; the seed is not used."""

    guide = end_loss(job, config.guided, config.guided.slices)

    def quantize_block(task: BlockTask) -> None:
        for stage in stages(task):
            quantize_stage(task, stage, config, guide)

    return run_blocks(job, quantize_block, with_float_states=config.gptaq > 0)


METHOD = Method("ptq", "second-order error compensation, column by column", Config, run)
