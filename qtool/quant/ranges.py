"""Choosing the range of a group: shrink the min-max range where that lowers the rounding error.

Clipping a few large weights buys resolution for all others. The error is ``sum_j h_j |w_j - Q(w_j)|**norm``, with
``h`` one, or the second moment of the input channel when it is known (then norm 2 is the output error of the group
under uncorrelated inputs). Symmetric grids shrink one number, as LR-QAT does (arXiv 2406.06385); asymmetric grids
shrink both ends together, as GPTQ's range search does, and then each end alone. No absolute margin is used.
"""

import torch
from torch import Tensor

from qtool.config import QuantSpec
from qtool.quant.affine import from_codes, grouped, minmax_qparams, round_to_codes, scale_and_zero_point, to_grid

SHRINKS = tuple(1 - i / 100 for i in range(1, 80))


def range_error(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, norm: float, h: Tensor) -> Tensor:
    """``sum h |w - Q(w)|**norm`` of groups, ``[out, groups]``; ``h`` broadcasts to ``[out, groups, group_size]``."""
    codes = round_to_codes(to_grid(weight, scale, zero_point, spec), spec)
    error = grouped((from_codes(codes, scale, zero_point) - weight).abs_(), spec)
    return (error.square_() if norm == 2 else error.pow_(norm)).mul_(h).sum(-1)


@torch.no_grad()
def search_qparams(
    weight: Tensor, spec: QuantSpec, norm: float = 2.4, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[out, groups]`` that lower the error of rounding ``weight`` ``[out, in]``.

    ``importance`` ``[in]`` weighs input channels. Never worse than ``minmax_qparams`` under the same measure.
    """
    weight = weight.float()
    h = weight.new_ones(1) if importance is None else importance.float().view(1, spec.num_groups(weight.shape[1]), -1)
    groups = grouped(weight, spec)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale, zero_point = minmax_qparams(weight, spec)
    best = range_error(weight, scale, zero_point, spec, norm, h)
    best_low, best_high = low, high

    def consider(candidate_low: Tensor, candidate_high: Tensor) -> None:
        nonlocal scale, zero_point, best, best_low, best_high
        candidate = scale_and_zero_point(candidate_low, candidate_high, spec)
        error = range_error(weight, *candidate, spec, norm, h)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero_point)
        best_low, best_high = (
            torch.where(better, candidate_low, best_low),
            torch.where(better, candidate_high, best_high),
        )

    for shrink in SHRINKS:
        consider(low * shrink, high * shrink)
    if not spec.symmetric:
        joint_low, joint_high = best_low, best_high
        for shrink in SHRINKS:
            consider(low * shrink, joint_high)
        joint_low = best_low
        for shrink in SHRINKS:
            consider(joint_low, high * shrink)
    return scale, zero_point
