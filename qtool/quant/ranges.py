"""Choosing the range of a group: shrink the min-max range where that lowers the rounding error.

Clipping a few large weights gives all others a finer grid. The error is ``sum_j h_j |w_j - Q(w_j)|**norm``. ``h`` is
one, or the second moment of the input channel if it is known: then norm 2 is the output error of the group under
uncorrelated inputs. Symmetric grids shrink one number, as LR-QAT does (arXiv 2406.06385); asymmetric grids shrink both
ends together, as GPTQ's range search does, and then each end alone. A candidate replaces the best so far if its error
is smaller; no absolute margin is used.

The factor on the range is the scaling factor gamma of arXiv 2411.06084, ``scale = gamma * max|w| / level``. Here each
group has a gamma of its own, the best of 1, 0.98, ... 0.22. Methods offer the search as ``range: search`` or always use
it.
"""

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import grouped, minmax_qparams, scale_and_zero_point, settled

SHRINKS = tuple(1 - i / 50 for i in range(1, 40))  # factors on the range that are tried, beside 1
NUMBERS_AT_ONCE = 1 << 21  # number of weights times candidates evaluated together


def worthwhile(spec: QuantSpec, group_size: int, norm: float) -> tuple[float, ...]:
    """Return the factors on a whole range that can lower ``sum |w - Q(w)|**norm`` of ``group_size`` weights.

    On a symmetric grid that is not shrunk, each error is at most half a step, ``m / qmax`` for the largest absolute
    weight ``m``; shrunk by ``f``, that weight alone has the error ``(1 - f) m``. Factors that cannot win are not tried.
    The rounding of scales changes both by ``eps m`` at most, if scales are normal numbers of their dtype.
    """
    if not spec.symmetric:  # the rounding of zero points moves the ends
        return SHRINKS
    eps = torch.finfo(getattr(torch, spec.scale_dtype)).eps
    most = 1.01 * (group_size ** (1 / norm) * (1 / spec.qmax + eps) + eps)
    return tuple(factor for factor in SHRINKS if 1 - factor <= most)


def range_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, norm: float, importance: Tensor
) -> Tensor:
    """Return ``sum h |w - Q(w)|**norm`` over the last dimension of ``groups`` ``[..., out, groups, group_size]``.

    ``scale`` and ``zero_point`` ``[..., out, groups]`` may have a leading dimension of candidates.
    """
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    error = (groups / scale).add_(zero_point).round_().clamp_(spec.qmin, spec.qmax)
    error.sub_(zero_point).mul_(scale).sub_(groups)
    return (error.square_() if norm == 2 else error.abs_().pow_(norm)).mul_(importance).sum(-1)


@torch.no_grad()
def search_qparams(
    weight: Tensor, spec: QuantSpec, norm: float = 2.4, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point ``[out, groups]`` with the smallest error of rounding ``weight`` ``[out, in]``.

    ``importance`` ``[in]`` is ``h``. The error is never above that of ``minmax_qparams``.
    """
    if spec.blocks is not None:
        return _by_blocks(weight, spec, norm, importance)
    groups = grouped(weight.float(), spec)
    h = groups.new_ones(1) if importance is None else importance.float().view(1, groups.shape[1], -1)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale, zero_point = minmax_qparams(weight, spec)
    best = range_error(groups, scale, zero_point, spec, norm, h)
    best_low, best_high = low, high
    normal = bool((scale >= torch.finfo(getattr(torch, spec.scale_dtype)).smallest_normal).all())
    whole = worthwhile(spec, groups.shape[-1], norm) if importance is None and normal else SHRINKS

    def consider(lows: Tensor, highs: Tensor) -> None:
        """Try candidates ``[c, out, groups]``; a candidate that is better replaces the best so far."""
        nonlocal scale, zero_point, best, best_low, best_high
        scales, zero_points = scale_and_zero_point(lows, highs, spec)
        errors, index = range_error(groups, scales, zero_points, spec, norm, h).min(0)
        better, index = errors < best, index.unsqueeze(0)
        best = torch.where(better, errors, best)
        scale = torch.where(better, scales.gather(0, index)[0], scale)
        zero_point = torch.where(better, zero_points.gather(0, index)[0], zero_point)
        best_low = torch.where(better, lows.gather(0, index)[0], best_low)
        best_high = torch.where(better, highs.gather(0, index)[0], best_high)

    def shrink(factors: tuple[float, ...], shrink_low: bool, shrink_high: bool) -> None:
        if not factors:
            return
        shrinks = torch.tensor(factors, device=weight.device).view(-1, 1, 1)
        from_low, from_high = (low if shrink_low else best_low), (high if shrink_high else best_high)
        for some in shrinks.split(max(1, NUMBERS_AT_ONCE // weight.numel())):
            ones = torch.ones_like(some)
            consider(from_low * (some if shrink_low else ones), from_high * (some if shrink_high else ones))

    shrink(whole, True, True)
    if not spec.symmetric:
        shrink(SHRINKS, True, False)
        shrink(SHRINKS, False, True)
    return scale, zero_point


def _by_blocks(weight: Tensor, spec: QuantSpec, norm: float, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Search the range of each group by itself, and store the result by blocks where that lowers a block's error."""
    groups, grid = grouped(weight.float(), spec), spec.blocks
    assert grid is not None
    h = groups.new_ones(1) if importance is None else importance.float().view(1, groups.shape[1], -1)
    searched = settled(*search_qparams(weight, spec.free, norm, importance), spec)
    plain = minmax_qparams(weight, spec)
    errors = (range_error(groups, *found, spec, norm, h).unflatten(1, (-1, grid.groups)) for found in (searched, plain))
    after, before = (error.sum(-1) for error in errors)
    better = (after < before).repeat_interleave(grid.groups, 1)
    return torch.where(better, searched[0], plain[0]), torch.where(better, searched[1], plain[1])
