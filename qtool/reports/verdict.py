"""The words for a loss of quality, by one rule from a measured loss and its standard error.

The loss is relative to the float model: the relative increase of perplexity, the relative decrease of accuracy, or KL
divergence in nats, which is about the relative increase of perplexity on text that the float model wrote. If the
interval of ``SIGMAS`` standard errors around the loss lies in one class, the loss gets the words of that class; else it
gets the words of both ends, so that a test on too little text never says "nearly lossless".
"""

import math

SIGMAS = 2
CLASSES = (  # upper limit of the loss, inclusive, and words
    (-0.01, "better than the float model"),
    (0.01, "nearly lossless"),
    (0.05, "a small loss"),
    (0.20, "a clear loss"),
    (math.inf, "a large loss"),
)
RULE = (
    "Loss is relative to the float model: increase of perplexity, decrease of accuracy, or KL divergence in nats. "
    f"Up to {CLASSES[1][0]:.0%} is {CLASSES[1][1]}, up to {CLASSES[2][0]:.0%} {CLASSES[2][1]}, up to "
    f"{CLASSES[3][0]:.0%} {CLASSES[3][1]}, above that {CLASSES[4][1]}; more than {-CLASSES[0][0]:.0%} below the float "
    f"model is {CLASSES[0][1]}. If the interval of ± {SIGMAS} standard errors reaches into several classes, the words "
    "name both of its ends."
)


def relative_loss(value: float, reference: float, higher_is_better: bool) -> float:
    """Return by how much ``value`` is worse than ``reference``, relative to ``reference``; NaN if that is zero."""
    if reference == 0:
        return math.nan
    return (reference - value if higher_is_better else value - reference) / abs(reference)


def words(loss: float, stderr: float | None) -> str:
    """Return the words for a loss with this standard error."""
    if not math.isfinite(loss):
        return "broken (not a finite number)"
    if stderr is None:
        return f"{_class(loss)} (if its standard error, which is unknown, is small)"
    if not math.isfinite(stderr):
        return "undecided (its standard error is not a finite number)"
    low, high = (_class(loss + sign * SIGMAS * stderr) for sign in (-1, 1))
    return low if low == high else f"between {low} and {high} (too few observations to say more)"


def _class(loss: float) -> str:
    return next(text for limit, text in CLASSES if loss <= limit)
