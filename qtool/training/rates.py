"""Learning rates from travel, the distance that a parameter can move over a whole training.

An Adam step moves a parameter by about its learning rate, so a parameter whose gradient keeps its sign moves by the
rate times the sum of the schedule's factors (``fit.total_factor``). Recipes give that distance: it holds for any
schedule and any number of steps from ``min_steps`` up (``plan.py``; in fewer steps parameters move less). The caller
converts it from the unit of its key to the parameter's own unit.

Where all blocks train at once, every block adds its part to what a step changes in the model's outputs, so a deeper
model has shorter distances (``end_to_end_total``). With those of a model of 4 blocks, the first step of E2E-QP on the
30 of SmolLM2-135M at 3 bits makes the loss more than five times as high (docs/log/training.md).
"""

from torch import nn

from qtool.config.training import DISTANCE_BLOCKS
from qtool.training.fit import ParamGroup

START_MARGIN = 0.15  # distance from the edges of their cells at which weights start from given codes, in codes
LEAST_TOTAL = 1e-9  # stands in for the sum of the factors of a training without steps


def rate(distance: float, total: float, override: float | None) -> float:
    """Return the learning rate at which a parameter moves by ``distance``; ``override`` replaces it if it is set.

    ``total`` is the sum of the schedule's factors.
    """
    return distance / max(total, LEAST_TOTAL) if override is None else override


def of_depth(distance: float, num_blocks: int) -> float:
    """Return a distance of a recipe in a model whose ``num_blocks`` decoder blocks all train at once.

    Distances of recipes are those of a model of ``DISTANCE_BLOCKS`` blocks or fewer; in one of ``n`` blocks they are
    ``DISTANCE_BLOCKS / n`` of that.
    """
    return distance / max(1.0, num_blocks / DISTANCE_BLOCKS)


def end_to_end_total(total: float, num_blocks: int) -> float:
    """Return what distances are divided by where all ``num_blocks`` decoder blocks of a model train at once.

    ``total`` is the sum of the schedule's factors; see ``of_depth``.
    """
    return total / of_depth(1.0, num_blocks)


def scale_group(scale: nn.Parameter, share: float, total: float, override: float | None = None) -> ParamGroup:
    """Return the group of the scales of a linear, each of which can move by ``share`` of its own size at the start.

    The scales of a linear differ: those of a Gemma 3 go from a thirtieth of their mean to seventeen times it, and the
    same rate for all would take the smallest through zero. An ``override`` is such a rate.
    """
    return ParamGroup([scale], rate(share, total, override), relative=override is None)


def ends_to_scale(ends: float, qmax: int) -> float:
    """Convert a travel of the ends of a range, in quantization steps, to that of its scale, as a share of the scale.

    An end lies ``qmax / 2`` steps from the middle of the range, so it moves by one step where the scale changes by
    ``2 / qmax`` of itself.
    """
    return ends * 2 / qmax
