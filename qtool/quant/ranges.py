"""Choosing the range of a group: shrink the min-max range where that lowers the rounding error.

Clipping a few large weights gives all others a finer grid. The error is ``sum_j h_j |w_j - Q(w_j)|**norm``. ``h`` is
one, or the second moment of the input channel if it is known: then norm 2 is the output error of the group under
uncorrelated inputs. Symmetric grids shrink one number, as LR-QAT does (arXiv 2406.06385); asymmetric grids shrink both
ends together, as GPTQ's range search does, and then each end alone. A candidate replaces the best so far if its error
is smaller; no absolute margin is used.

Where zero points lie between codes, scale and zero point then move together, in two finer and finer grids of steps
around the best. NeUQI (arXiv 2505.17595) finds the best zero point of each scale exactly, for squares of errors: that
costs 13 times as much, and the refinement here comes as near or nearer to the best of exponents above 2.

Where scales may be negative, a symmetric grid is tried with its extra level on either side of zero.

The factor on the range is the scaling factor gamma of arXiv 2411.06084, ``scale = gamma * max|w| / level``. Here each
group has a gamma of its own, the best of 1, 0.98, ... 0.22. Methods offer the search as ``range: search`` or always use
it.
"""

import torch
from torch import Tensor

from qtool.config.quant import QuantSpec
from qtool.quant.affine import grouped, minmax_qparams, scale_and_zero_point, settled, stored_scale, stored_zero_point

SHRINKS = tuple(1 - i / 50 for i in range(1, 40))  # factors on the range that are tried, beside 1
STEPS = 6  # steps to either side, of scale and of zero point, in a refinement
REFINEMENTS = ((0.04, 0.125), (0.01, 0.04))  # a step of the scale, as a share of it, and of the zero point, in codes
NUMBERS_AT_ONCE = 1 << 21  # number of weights times candidates evaluated together


def worthwhile(spec: QuantSpec, group_size: int, norm: float) -> tuple[float, ...]:
    """Return the factors on a whole range that can lower ``sum |w - Q(w)|**norm`` of ``group_size`` weights.

    On a symmetric grid that is not shrunk, each error is at most half a step, ``m / qmax`` for the largest absolute
    weight ``m``; shrunk by ``f``, that weight alone has at least the error ``(1 - f (qmax + 1) / qmax) m``, as the
    lowest level lies ``(qmax + 1) / qmax`` of the range from zero. Factors that cannot win are not tried. The rounding
    of scales changes both by ``eps m`` at most, if scales are normal numbers of their dtype.
    """
    if not spec.symmetric:  # the rounding of zero points moves the ends
        return SHRINKS
    eps = torch.finfo(getattr(torch, spec.scale_dtype)).eps
    most = 1.01 * (group_size ** (1 / norm) * (1 / spec.qmax + eps) + eps)
    return tuple(factor for factor in SHRINKS if 1 - factor * (spec.qmax + 1) / spec.qmax <= most)


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


class Search:
    """The best grid so far of each group of a weight, to which candidates are compared."""

    def __init__(self, weight: Tensor, spec: QuantSpec, norm: float, importance: Tensor | None) -> None:
        """Start at the min-max range of ``weight`` ``[out, in]``; ``importance`` ``[in]`` is ``h``."""
        self.groups, self.spec, self.norm = grouped(weight.float(), spec), spec, norm
        self.importance = self.groups.new_ones(1)
        if importance is not None:
            self.importance = importance.float().view(1, self.groups.shape[1], -1)
        self.scale, self.zero_point = minmax_qparams(weight, spec)
        self.error = range_error(self.groups, self.scale, self.zero_point, spec, norm, self.importance)
        self.at_once = max(1, NUMBERS_AT_ONCE // weight.numel())

    def consider(self, scales: Tensor, zero_points: Tensor) -> tuple[Tensor, Tensor]:
        """Try stored candidates ``[c, out, groups]``; one that is better replaces the best so far.

        Return where one is, ``[out, groups]``, and the index of the best candidate ``[1, out, groups]``.
        """
        errors = range_error(self.groups, scales, zero_points, self.spec, self.norm, self.importance)
        errors, index = errors.min(0)
        better, index = errors < self.error, index.unsqueeze(0)
        self.error = torch.where(better, errors, self.error)
        self.scale = torch.where(better, scales.gather(0, index)[0], self.scale)
        self.zero_point = torch.where(better, zero_points.gather(0, index)[0], self.zero_point)
        return better, index


@torch.no_grad()
def search_qparams(
    weight: Tensor, spec: QuantSpec, norm: float = 2.4, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point ``[out, groups]`` with the smallest error of rounding ``weight`` ``[out, in]``.

    ``importance`` ``[in]`` is ``h``. The error is never above that of ``minmax_qparams``.
    """
    if spec.blocks is not None:
        return _by_blocks(weight, spec, norm, importance)
    search = Search(weight, spec, norm, importance)
    if spec.symmetric:
        _shrink_scale(search, plain=importance is None)
    else:
        _shrink_ends(search)
        if spec.float_zero:
            for step in REFINEMENTS:
                _refine(search, *step)
    return search.scale, search.zero_point


def _shrink_scale(search: Search, plain: bool) -> None:
    """Shrink the scale of a symmetric grid, with both signs where scales may be negative; ``plain``: ``h`` is one."""
    groups, spec = search.groups, search.spec
    largest = groups.abs().amax(-1)
    largest = torch.where(largest == 0, 1.0, largest)  # a group of zeros has no error on any grid
    normal = bool((search.scale.abs() >= torch.finfo(getattr(torch, spec.scale_dtype)).smallest_normal).all())
    factors = worthwhile(spec, groups.shape[-1], search.norm) if plain and normal else SHRINKS
    factors = (1.0, *factors)
    if spec.signed:
        factors += tuple(-factor for factor in factors)
    for some in torch.tensor(factors, device=groups.device).view(-1, 1, 1).split(search.at_once):
        scales = stored_scale(largest * some * (2 / spec.qmax), spec)
        search.consider(scales, search.zero_point.expand_as(scales))


def _shrink_ends(search: Search) -> None:
    """Shrink both ends of an asymmetric range together, then each end alone."""
    low, high = search.groups.amin(-1).clamp(max=0), search.groups.amax(-1).clamp(min=0)
    best_low, best_high = low, high
    shrinks = torch.tensor(SHRINKS, device=low.device).view(-1, 1, 1)
    for shrink_low, shrink_high in ((True, True), (True, False), (False, True)):
        from_low, from_high = (low if shrink_low else best_low), (high if shrink_high else best_high)
        for some in shrinks.split(search.at_once):
            ones = torch.ones_like(some)
            lows = from_low * (some if shrink_low else ones)
            highs = from_high * (some if shrink_high else ones)
            better, index = search.consider(*scale_and_zero_point(lows, highs, search.spec))
            best_low = torch.where(better, lows.gather(0, index)[0], best_low)
            best_high = torch.where(better, highs.gather(0, index)[0], best_high)


def _refine(search: Search, of_scale: float, of_zero: float) -> None:
    """Try scales and zero points around the best; with another scale, the middle of the range stays where it is."""
    spec, scale, middle = search.spec, search.scale, search.zero_point - search.spec.qmax / 2
    steps = torch.arange(-STEPS, STEPS + 1, device=scale.device)
    for some in torch.cartesian_prod(steps, steps).split(search.at_once):
        factor, shift = 1 + of_scale * some[:, :1, None], of_zero * some[:, 1:, None]
        scales = stored_scale(scale * factor, spec)
        zero_points = middle * (scale / scales) + shift + spec.qmax / 2
        search.consider(scales, stored_zero_point(zero_points, scales, spec))


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
