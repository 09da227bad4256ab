"""The words for a loss of quality: one rule, on a measured number and its standard error.

The loss is relative to the float model: by how much perplexity grew, what share of an accuracy is gone, or KL
divergence in nats, which is about the growth of perplexity on the float model's own text. The interval of ``SIGMAS``
standard errors around it has to lie inside one class to get that class's words; an interval that reaches further gets
the words of both its ends, so a test that is too small can never say "nearly lossless".
"""

import math

SIGMAS = 2
CLASSES = (  # upper ends of the loss, each included, and words; what is above the last has no end
    (-0.01, "better than the float model"),
    (0.01, "nearly lossless"),
    (0.05, "a small loss"),
    (0.20, "a clear loss"),
    (math.inf, "a large loss"),
)
RULE = (
    "Loss is measured against the float model: growth of perplexity, lost share of accuracy, or KL divergence in nats. "
    f"Up to {CLASSES[1][0]:.0%} is {CLASSES[1][1]}, up to {CLASSES[2][0]:.0%} {CLASSES[2][1]}, up to "
    f"{CLASSES[3][0]:.0%} {CLASSES[3][1]}, above that {CLASSES[4][1]}; more than {-CLASSES[0][0]:.0%} below the float "
    f"model is {CLASSES[0][1]}. The whole interval of ± {SIGMAS} standard errors must lie in one class; where it does "
    "not, both ends are named."
)


def relative_loss(value: float, reference: float, higher_is_better: bool) -> float:
    """By how much ``value`` is worse than ``reference``, as a share of it; NaN where that is zero."""
    if reference == 0:
        return math.nan
    return (reference - value if higher_is_better else value - reference) / abs(reference)


def words(loss: float, stderr: float | None) -> str:
    """What a loss with this standard error is called."""
    if not math.isfinite(loss):
        return "broken (not a finite number)"
    if stderr is None:
        return f"{_class(loss)} (if its error, which is not known, is small)"
    if not math.isfinite(stderr):
        return "undecided (its error is not a finite number)"
    low, high = (_class(loss + sign * SIGMAS * stderr) for sign in (-1, 1))
    return low if low == high else f"between {low} and {high} (too few observations to say more)"


def _class(loss: float) -> str:
    return next(text for limit, text in CLASSES if loss <= limit)
