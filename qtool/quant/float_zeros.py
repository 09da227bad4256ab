"""The best zero point of a group for a given scale, where zero points lie between codes (NeUQI, arXiv 2505.17595).

In grid units, ``x = w / scale``, the error of a weight is ``clamp(round(x + z)) - (x + z)``, and the loss ``sum h e**2``
of a group is piecewise quadratic in ``z``. It is lowered in two steps.

1. Between the levels each weight's error counts as its largest, ``1/4``. What is left of a weight's loss is ``h u**2``
   where ``u = x + z < -1/2``, ``h (u - qmax)**2`` where ``u > qmax + 1/2``, and ``h / 4`` between: a convex function,
   and so is their sum. Its minimum is found by bisection: the weights outside on either side are a prefix and a suffix
   of the sorted group, and prefix sums of ``h`` and ``h w`` give the slope.
2. Within one of that point the loss itself is minimised. A code changes where a weight crosses the middle between two
   levels; between two such places the loss is a parabola, whose vertex, clamped to them, is its minimum there.

Where we differ: the first step bisects, where the paper sorts two break points of each weight for each scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BISECTIONS = 10  # halvings of a range of at most a few widths of the group


class SortedGroups(NamedTuple):
    """The weights of each group in rising order, and prefix sums over them."""

    values: Tensor  # [N, n]
    mass: Tensor  # [N, n + 1]: sums of h
    moment: Tensor  # [N, n + 1]: sums of h w


def sorted_groups(groups: Tensor, importance: Tensor) -> SortedGroups:
    """Sort ``groups`` ``[N, n]``; ``importance`` ``[N, n]`` is ``h``."""
    values, order = groups.sort(-1)
    h = importance.gather(-1, order)
    mass, moment = (torch.nn.functional.pad(each.cumsum(-1), (1, 0)) for each in (h, h * values))
    return SortedGroups(values, mass, moment)


def coarse_zero(found: SortedGroups, scales: Tensor, qmax: int) -> Tensor:
    """Return the minimum ``[N, c]`` of the convex loss of step 1 for ``scales`` ``[N, c]``, in codes."""
    values, mass, moment = found
    low = -values[:, -1:] - scales  # all weights lie below the lowest level; ``low`` and ``high`` are z * scale
    high = scales * (qmax + 1) - values[:, :1]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = torch.searchsorted(values, -scales / 2 - middle)
        above = torch.searchsorted(values, scales * (qmax + 0.5) - middle, right=True)
        slope = moment.gather(1, below) + middle * mass.gather(1, below)
        rest, far = (side[:, -1:] - side.gather(1, above) for side in (mass, moment))
        slope += far + (middle - scales * qmax) * rest
        rises = slope >= 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return (low + high) / (2 * scales)


def exact_zero(groups: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, qmax: int) -> Tensor:
    """Return the minimum of the loss within one of ``zeros`` ``[N, c]``; ``groups``, ``importance`` are ``[N, n]``."""
    n = groups.shape[1]
    start = zeros - 1
    on_grid = groups.unsqueeze(1) / scales.unsqueeze(2) + start.unsqueeze(2)  # [N, c, n]
    nearest = (on_grid + 0.5).floor()
    crossing, order = (nearest + 0.5 - on_grid).sort(-1)  # how far z rises until a weight goes to the next level
    error = (nearest.clamp(0, qmax) - on_grid).gather(-1, order)
    level = nearest.gather(-1, order)
    h = importance.unsqueeze(1).expand_as(order).gather(-1, order)
    first = (level >= 0) & (level < qmax)
    second = (level >= -1) & (level < qmax - 1)
    mass = h.sum(-1, keepdim=True)
    steps = torch.cat([h * first, h * second], -1)
    squares = torch.cat([error, error + first], -1).mul_(2).add_(1).mul_(steps)
    total = (h * error).sum(-1, keepdim=True) + torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    square = torch.nn.functional.pad(squares.cumsum(-1), (1, 0))  # [N, c, 2 n + 1], without the start's, as all have it
    ends = torch.cat([torch.zeros_like(crossing[..., :1]), crossing, crossing + 1, torch.full_like(mass, 2.0)], -1)
    vertex = (total / mass).clamp_(ends[..., :-1], ends[..., 1:])
    loss = square - 2 * vertex * total + vertex.square() * mass
    best = loss.argmin(-1, keepdim=True)
    return start + vertex.gather(-1, best).squeeze(-1)
