"""Learning rates from travel, the distance that a parameter can move over a whole training.

An Adam step moves a parameter by about its learning rate, so a parameter whose gradient keeps its sign moves by the
rate times the sum of the schedule's factors (``fit.total_factor``). Recipes give that distance: it holds for any
schedule and any number of steps from ``min_steps`` up (``plan.py``; in fewer steps parameters move less). The caller
converts it from the unit of its key to the parameter's own unit.
"""

LEAST_TOTAL = 1e-9  # stands in for the sum of the factors of a training without steps


def rate(distance: float, total: float, override: float | None) -> float:
    """Return the learning rate at which a parameter moves by ``distance``; ``override`` replaces it if it is set.

    ``total`` is the sum of the schedule's factors.
    """
    return distance / max(total, LEAST_TOTAL) if override is None else override


def ends_to_scale(ends: float, scale: float, qmax: int) -> float:
    """Convert a travel or learning rate of the ends of a range, in quantization steps, to that of its scale.

    An end lies ``qmax / 2`` steps of size ``scale`` from the middle of the range, so it moves by one step where the
    scale changes by ``2 / qmax`` of itself.
    """
    return ends * scale * 2 / qmax
